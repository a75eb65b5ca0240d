"""KVStrata under SGLang: name this module in ``--hicache-storage-backend-extra-config``."""

from __future__ import annotations

from typing import Any

__all__ = ["KVStrataStorage"]


def __getattr__(name: str) -> Any:
    """The storage when it is asked for: SGLang's plugin is imported by processes without one."""
    if name == "KVStrataStorage":
        from kvstrata.connectors.sglang.storage import KVStrataStorage

        return KVStrataStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
