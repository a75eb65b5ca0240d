"""Copies between slots of the pool and the engine's blocks, in runs as long as both sides allow.

The bytes of a native payload lie in a slot as they lie in the engine: layer by layer, block by
block. Nothing here interprets them.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvstrata.connectors.vllm.pages import Pages
from kvstrata.memory.pool import PoolMapping
from kvstrata.objects import HEADER_BYTES

logger = logging.getLogger(__name__)

Addresses = npt.NDArray[np.int64]
Runs = tuple[list[int], list[int], list[int]]
"""Addresses in slots, addresses in blocks, and lengths."""
REGISTER_BYTES = 1 << 30


class Plan:
    """Pairs of addresses, a row per layer: ``slots[l, i]`` and ``blocks[l, i]`` hold one page.

    Args:
        pages: the engine's pages.
        payloads: for each chunk, the address of its native payload.
        blocks: block ids, ``per_chunk`` for each payload; -1 where nothing is to be copied.
    """

    def __init__(self, pages: Pages, payloads: Sequence[int], blocks: Sequence[int]) -> None:
        ids = np.asarray(blocks, np.int64)
        per_chunk = len(ids) // len(payloads)
        page, layers = pages.page_bytes, len(pages.layer_names)
        within = np.arange(len(ids)) % per_chunk
        starts = np.repeat(np.asarray(payloads, np.int64), per_chunk) + within * page
        wanted = ids >= 0
        rows = np.arange(layers, dtype=np.int64)[:, np.newaxis] * (per_chunk * page)
        self.slots: Addresses = starts[wanted][np.newaxis, :] + rows
        self.blocks: Addresses = pages.addresses(ids[wanted])
        self.page_bytes = page
        self.layer_names = pages.layer_names

    @property
    def nbytes(self) -> int:
        """What it copies in all."""
        return self.slots.size * self.page_bytes

    def runs(self, layer: int | None = None) -> Runs:
        """Of one layer, or of all."""
        pick = slice(None) if layer is None else slice(layer, layer + 1)
        slots, blocks = self.slots[pick].ravel(), self.blocks[pick].ravel()
        if not len(slots):
            return [], [], []
        page = self.page_bytes
        joined = (np.diff(slots) == page) & (np.diff(blocks) == page)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))
        lengths = np.diff(np.append(starts, len(slots))) * page
        return slots[starts].tolist(), blocks[starts].tolist(), lengths.tolist()


class Copier(ABC):
    """Copies plans one way or the other; blocks until the bytes are there.

    ``reads_blocks`` says whether this processor can read the engine's blocks itself.
    """

    reads_blocks = False

    @abstractmethod
    def load(self, plan: Plan, after: Any) -> None:
        """Slots to blocks, once ``after`` (from `mark`) has come to pass."""

    @abstractmethod
    def store(self, plan: Plan, after: Any) -> None:
        """Blocks to slots, once ``after`` (from `mark`) has come to pass."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in the engine's own work that a copy has to wait for."""

    def attach(self, pool: PoolMapping) -> None:  # noqa: B027 - optional
        """Prepare for copies from and to this mapping."""

    def detach(self) -> None:  # noqa: B027 - optional
        """Undo `attach`; no copy is under way."""


class CpuCopier(Copier):
    """The engine's blocks are in this process's own memory."""

    reads_blocks = True

    def load(self, plan: Plan, after: Any) -> None:
        slots, blocks, lengths = plan.runs()
        copy_runs(blocks, slots, lengths)

    def store(self, plan: Plan, after: Any) -> None:
        slots, blocks, lengths = plan.runs()
        copy_runs(slots, blocks, lengths)

    def mark(self) -> None:
        """On the CPU the forward is over when it returns."""


class CudaCopier(Copier):
    """The engine's blocks are on a GPU: a side stream, batched copies, pinned memory.

    The mapping is registered in pieces, in the background, so that a start does not wait for it;
    until a piece is registered its copies are pageable, thus slower, and just as right.

    Args:
        device: where the blocks are.
    """

    def __init__(self, device: torch.device) -> None:
        from vllm import _custom_ops

        self._swap = _custom_ops.swap_blocks_batch
        self._device = device
        self._local = threading.local()
        self._registered: list[int] = []
        self._base = 0
        self._registering: threading.Thread | None = None
        self._stop = threading.Event()

    def load(self, plan: Plan, after: Any) -> None:
        slots, blocks, lengths = split_runs(*plan.runs(), self._base, REGISTER_BYTES)
        stream = self._stream()
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            self._swap(_pointers(slots), _pointers(blocks), _pointers(lengths))
        stream.synchronize()

    def store(self, plan: Plan, after: Any) -> None:
        slots, blocks, lengths = split_runs(*plan.runs(), self._base, REGISTER_BYTES)
        stream = self._stream()
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            self._swap(_pointers(blocks), _pointers(slots), _pointers(lengths))
        stream.synchronize()

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def attach(self, pool: PoolMapping) -> None:
        self._stop.clear()
        self._base = pool.address
        self._registering = threading.Thread(
            target=self._register, args=(pool.address, pool.capacity_bytes), daemon=True
        )
        self._registering.start()

    def detach(self) -> None:
        self._stop.set()
        if self._registering is not None:
            self._registering.join()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()

    def _stream(self) -> torch.cuda.Stream:
        """A stream of this thread's own, so that loads do not queue behind stores."""
        stream: torch.cuda.Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            torch.cuda.set_device(self._device)
            stream = self._local.stream = torch.cuda.Stream(self._device)
        return stream

    def _register(self, address: int, nbytes: int) -> None:
        torch.cuda.set_device(self._device)
        for start in range(0, nbytes, REGISTER_BYTES):
            if self._stop.is_set():
                return
            length = min(REGISTER_BYTES, nbytes - start)
            error = torch.cuda.cudart().cudaHostRegister(address + start, length, 0)
            if int(error) != 0:
                logger.warning(
                    "KVStrata: %d MiB of the pool cannot be pinned (CUDA error %d); copies from "
                    "there are slower", length >> 20, int(error),
                )  # fmt: skip
                return
            self._registered.append(address + start)


def make_copier(device: torch.device) -> Copier:
    """The copier for blocks on this device."""
    return CudaCopier(device) if device.type == "cuda" else CpuCopier()


def copy_runs(to: Sequence[int], source: Sequence[int], lengths: Sequence[int]) -> None:
    """Copy runs of this process's memory, on this thread, without holding the GIL meanwhile."""
    for to_address, from_address, length in zip(to, source, lengths, strict=True):
        ctypes.memmove(to_address, from_address, length)


def payload_checksums(pages: Addresses, page_bytes: int, count: int) -> list[bytes]:
    """XXH3-128 of each of ``count`` payloads, of which ``pages`` has the pages, a row per layer.

    Reads this process's memory, at ``Plan.blocks`` or ``Plan.slots``.
    """
    sums = []
    for columns in np.split(pages, count, axis=1):
        digest = xxhash.xxh3_128()
        for address in columns.ravel().tolist():
            digest.update((ctypes.c_char * page_bytes).from_address(address))
        sums.append(digest.digest())
    return sums


def split_runs(
    slots: Sequence[int], blocks: Sequence[int], lengths: Sequence[int], base: int, piece: int
) -> tuple[list[int], list[int], list[int]]:
    """Cut runs where their slots cross a multiple of ``piece`` bytes from ``base``.

    The pool is registered with CUDA piece by piece, and one copy may not lie half in a piece that
    is registered and half in one that is not.
    """
    cut: tuple[list[int], list[int], list[int]] = ([], [], [])
    for slot, block, length in zip(slots, blocks, lengths, strict=True):
        done = 0
        while done < length:
            left = piece - (slot + done - base) % piece
            part = min(left, length - done)
            for numbers, number in zip(cut, (slot + done, block + done, part), strict=True):
                numbers.append(number)
            done += part
    return cut


def payload_address(pool: PoolMapping, offset: int) -> int:
    """Where the payload of the slot at ``offset`` begins in this process."""
    return pool.address + offset + HEADER_BYTES


def _pointers(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
