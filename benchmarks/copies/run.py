"""How fast blocks go into slots and back, beside a plain copy of the same bytes on one thread."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.common import BYTES_PER_TOKEN, CHUNK_TOKENS, Options, Row, expect, main, say, spread

from kvstrata.connectors.vllm.copies import CpuCopier, Plan, payload_address
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.layout import LayerGroup, native_order
from kvstrata.memory.pool import Pool
from kvstrata.objects import HEADER_BYTES, stored_bytes

NAME = "copies"
NUM_LAYERS = 30
BLOCK_TOKENS = 128
PAGE_BYTES = BLOCK_TOKENS * BYTES_PER_TOKEN // NUM_LAYERS
CHUNK_BYTES = CHUNK_TOKENS * BYTES_PER_TOKEN
#: a document of 3,000 tokens is 23 chunks; so many documents that no cache holds what was copied
CHUNKS_A_PLAN = 23
NUM_PLANS = 8
OURS, PLAIN, WHOLE = "KVStrata", "plain memcpy a document", "one memcpy of all documents"


def engine_memory(num_blocks: int) -> tuple[Pages, torch.Tensor]:
    """Pages as vLLM's CPU backend keeps those of SmolLM2, in one storage, faulted in."""
    memory = torch.zeros(NUM_LAYERS * num_blocks * PAGE_BYTES, dtype=torch.uint8)
    memory.fill_(1)
    bases = memory.data_ptr() + np.arange(NUM_LAYERS, dtype=np.int64) * num_blocks * PAGE_BYTES
    group = LayerGroup(
        index=0,
        kind="full",
        num_layers=NUM_LAYERS,
        num_kv_heads=3,
        head_dim=64,
        states=2,
        dtype="bfloat16",
    )
    pages = Pages(
        group=group,
        order=native_order(f"vllm/cpu-amx/b{BLOCK_TOKENS}/bfloat16"),
        layer_names=tuple(f"layers.{i}" for i in range(NUM_LAYERS)),
        block_tokens=BLOCK_TOKENS,
        page_bytes=PAGE_BYTES,
        num_blocks=num_blocks,
        bases=bases,
        strides=np.full(NUM_LAYERS, PAGE_BYTES, np.int64),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
    )
    return pages, memory


def measure(options: Options) -> list[Row]:
    """Both directions, in turns with plain copies in the same direction."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    random = np.random.default_rng(options.seed)
    total = CHUNKS_A_PLAN * NUM_PLANS
    slot_bytes = stored_bytes(CHUNK_BYTES)
    pages, memory = engine_memory(num_blocks=total + total // 2)
    pool = Pool.create(total * slot_bytes)
    pool.populate(in_background=False)
    copier = CpuCopier()
    rows: list[Row] = []
    try:
        # Blocks as a busy engine hands them out: any, in any order. So the slots.
        blocks = random.permutation(np.arange(1, pages.num_blocks))[:total]
        offsets = random.permutation(total) * slot_bytes
        payloads = [payload_address(pool, int(offset)) for offset in offsets]
        plans = [
            Plan(pages, payloads[i : i + CHUNKS_A_PLAN], blocks[i : i + CHUNKS_A_PLAN].tolist())
            for i in range(0, total, CHUNKS_A_PLAN)
        ]
        nbytes = total * CHUNK_BYTES
        slots = [pool.array(int(offset) + HEADER_BYTES, CHUNK_BYTES) for offset in offsets]

        def load() -> None:
            for plan in plans:
                copier.load(plan, None)

        def store() -> None:
            for plan in plans:
                copier.store(plan, None)

        def check(name: str) -> None:
            every = memory.numpy().reshape(NUM_LAYERS, -1, PAGE_BYTES)
            for block, slot in zip(blocks, slots, strict=True):
                same = np.array_equal(every[:, block].reshape(-1), slot)
                expect(same, f"{name}: the bytes of block {block} differ")

        def plain(to: int, source: int, calls: int) -> Callable[[], None]:
            each = nbytes // calls

            def copy() -> None:
                for start in range(0, nbytes, each):
                    ctypes.memmove(to + start, source + start, each)

            return copy

        whole, engine = pool.array(0, pool.capacity_bytes), memory.numpy()
        for name, ours, source, target in (
            ("slots -> blocks", load, whole, engine),
            ("blocks -> slots", store, engine, whole),
        ):
            # A prime period: no two pages are alike.
            source[:] = np.resize(random.integers(0, 256, 1_048_583, np.uint8), source.shape)
            addresses = target.ctypes.data, source.ctypes.data
            works = {OURS: ours, PLAIN: plain(*addresses, NUM_PLANS), WHOLE: plain(*addresses, 1)}
            rows += direction(options, name, works, target, check, nbytes)
    finally:
        pool.close()
    return rows


def direction(
    options: Options,
    name: str,
    works: dict[str, Callable[[], None]],
    target: npt.NDArray[np.uint8],
    check: Callable[[str], None],
    nbytes: int,
) -> list[Row]:
    """Ours and the baselines in turns, in changing order, each into memory that was cleared."""
    speeds: dict[str, list[float]] = {who: [] for who in works}
    for number in range(5 if options.quick else 19):
        names = list(works)
        for who in names[number % 3 :] + names[: number % 3]:
            target[:] = 0
            began = time.perf_counter()
            works[who]()
            took = time.perf_counter() - began
            if who == OURS:
                check(name)
            if number:  # the first round warms up
                speeds[who].append(nbytes / took / 1e9)
    medians = {who: spread(each).median for who, each in speeds.items()}
    say(f"{name}: " + ", ".join(f"{who} {speed:.2f} GB/s" for who, speed in medians.items()))
    rows = []
    for baseline, bound in ((PLAIN, 0.80), (WHOLE, None)):
        pairs = zip(speeds[OURS], speeds[baseline], strict=True)
        ratio = spread(ours / theirs for ours, theirs in pairs)
        rows.append(
            Row(
                NAME,
                f"copy {name} / {baseline}, one thread (speed)",
                ratio.median,
                bound,
                at_most=False,
                detail=f"{ratio}; {medians[OURS]:.1f} of {medians[baseline]:.1f} GB/s",
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
