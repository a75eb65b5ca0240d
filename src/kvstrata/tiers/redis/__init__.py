"""The tier in Redis or Valkey: where it is, how its objects lie there, and the client."""
