"""A connector that is handed the caches where no runner is on the stack: in a thread.

So the engine's model is found by what holds its layers, as KVStrata's plugin has noted, or not at
all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstrata.connectors.vllm import KVStrataConnector


class OffStack(KVStrataConnector):
    """KVStrata's, but for the stack."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(super().register_kv_caches, kv_caches).result()
