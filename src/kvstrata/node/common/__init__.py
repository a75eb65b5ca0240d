"""What every room of the node needs: tasks and threads, the index of a tier, backing off."""
