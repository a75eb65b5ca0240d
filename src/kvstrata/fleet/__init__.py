"""A fleet of nodes, as its registry in Redis or Valkey knows it: ``docs/fleet.md``."""
