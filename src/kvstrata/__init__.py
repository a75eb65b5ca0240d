"""KVStrata: a KV-cache layer for LLM inference."""

__version__ = "0.2.0"
