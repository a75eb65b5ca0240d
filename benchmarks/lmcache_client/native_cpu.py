"""vLLM's own offloading on a CPU: as released it refuses every platform but CUDA and XPU.

Everything that decides is vLLM's: what is stored, looked up, evicted, and when. Only the copies are
ours, since its copy engine is CUDA's: pages go between the KV cache and memory of the process by
memcpy, at once, in the worker's own thread.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class MemcpyWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies whole pages, a row of each of the cache's tensors.

    Args:
        kv_caches: vLLM's, each tensor with the blocks first.
        num_chunks: rows of the memory beside it; a chunk is one block.
    """

    def __init__(self, kv_caches: Any, num_chunks: int) -> None:
        self._near = [
            each.tensor.view(torch.int8).view(-1, each.page_size_bytes).numpy()
            for each in kv_caches.tensors
        ]
        self._far = [np.zeros((num_chunks, near.shape[1]), np.int8) for near in self._near]
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """From the KV cache."""
        return self._copy(job_id, self._near, src_spec, self._far, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Into the KV cache."""
        return self._copy(job_id, self._far, src_spec, self._near, dst_spec)

    def get_finished(self) -> list[Any]:
        """What has ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def _copy(self, job_id: int, sources: Any, source: Any, targets: Any, target: Any) -> bool:
        began = time.perf_counter()
        rows = list(zip(source.block_ids.tolist(), target.block_ids.tolist(), strict=True))
        for here, there in zip(sources, targets, strict=True):
            for row, into in rows:
                there[into] = here[row]
        nbytes = len(rows) * sum(each.shape[1] for each in self._near)
        seconds = time.perf_counter() - began
        self._finished.append(
            TransferResult(job_id=job_id, success=True, transfer_size=nbytes, transfer_time=seconds)
        )
        return True


class CPUMemorySpec(CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's offloading to host memory, with these copies."""

    _memcpy: MemcpyWorker | None = None

    def get_worker(self, kv_caches: Any) -> Any:
        """The one worker; blocks and chunks must be the same."""
        assert self.blocks_per_chunk == 1
        if self._memcpy is None:
            self._memcpy = MemcpyWorker(kv_caches, self.num_chunks)
        return self._memcpy
