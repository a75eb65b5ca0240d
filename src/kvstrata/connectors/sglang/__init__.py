"""KVStrata under SGLang: name this module in ``--hicache-storage-backend-extra-config``."""

from kvstrata.connectors.sglang.storage import KVStrataStorage

__all__ = ["KVStrataStorage"]
