"""KVStrata: a KV-cache layer for LLM inference."""

__version__ = "0.1.0"
