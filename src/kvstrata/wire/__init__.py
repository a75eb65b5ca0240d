"""What crosses a node's socket, and a client's end of it: messages, connection, finding a node."""
