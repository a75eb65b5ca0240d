"""What the node saw: counters, and one record per request."""
