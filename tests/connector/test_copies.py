"""Plans copy what a naive loop would copy, in runs as long as both sides allow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.connectors.vllm.copies import (
    CpuCopier,
    Plan,
    copy_runs,
    make_copier,
    payload_address,
    split_runs,
)
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.errors import UsageError
from kvstrata.layout import LayerGroup, native_order
from kvstrata.memory.pool import Pool
from kvstrata.objects import HEADER_BYTES

Bytes = npt.NDArray[np.uint8]


class Engine:
    """Blocks of an engine: layers outermost, or blocks outermost, with or without padding."""

    def __init__(self, layers: int, blocks: int, page: int, padding: int, inside: bool) -> None:
        stride = page + padding
        self.layers, self.num_blocks, self.page = layers, blocks, page
        self.memory: Bytes = np.random.default_rng(0).integers(
            0, 256, layers * blocks * stride, np.uint8
        )
        base = self.memory.ctypes.data
        layer_stride, block_stride = (stride, layers * stride) if inside else (blocks * stride,
                                                                               stride)  # fmt: skip
        self.pages = Pages(
            group=LayerGroup(
                index=0, kind="full", num_layers=layers, num_kv_heads=1, head_dim=2, states=2,
                dtype="bfloat16",
            ),
            order=native_order("vllm/strided-NHC/b16/bfloat16"),
            layer_names=tuple(f"layer.{i}" for i in range(layers)),
            block_tokens=16,
            page_bytes=page,
            num_blocks=blocks,
            bases=np.array([base + i * layer_stride for i in range(layers)], np.int64),
            strides=np.full(layers, block_stride, np.int64),
            device=torch.device("cpu"),
            compute_dtype=torch.bfloat16,
        )  # fmt: skip

    def block(self, layer: int, block: int) -> Bytes:
        start = int(self.pages.addresses([block])[layer, 0]) - self.memory.ctypes.data
        return self.memory[start : start + self.page]


engines = st.builds(
    Engine,
    layers=st.integers(1, 4),
    blocks=st.integers(4, 12),
    page=st.sampled_from([1, 16, 48, 4096]),
    padding=st.sampled_from([0, 16]),
    inside=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(engine=engines, data=st.data())
def test_plans_copy_as_a_loop_would(engine: Engine, data: st.DataObject) -> None:
    per_chunk = data.draw(st.integers(1, 3), "blocks of a chunk")
    chunks = data.draw(st.integers(1, engine.num_blocks // per_chunk), "chunks")
    ids = data.draw(st.permutations(range(engine.num_blocks)))[: chunks * per_chunk]
    if data.draw(st.booleans(), "in a row"):
        ids = sorted(ids)
    holes = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)), "holes")
    blocks = [-1 if hole else block for block, hole in zip(ids, holes, strict=True)]
    size = engine.layers * per_chunk * engine.page
    apart = data.draw(st.sampled_from([size, size + 4096]), "from slot to slot")
    slots: Bytes = np.random.default_rng(1).integers(0, 256, chunks * apart, np.uint8)
    payloads = [slots.ctypes.data + i * apart for i in range(chunks)]
    plan = Plan(engine.pages, payloads, blocks)

    def loop(to_blocks: bool) -> tuple[Bytes, Bytes]:
        """What must be in slots and in the engine afterwards, page by page."""
        expected = slots.copy()
        for i, block in enumerate(blocks):
            for layer in range(engine.layers if block >= 0 else 0):
                start = (i // per_chunk) * apart
                start += (layer * per_chunk + i % per_chunk) * engine.page
                if to_blocks:
                    engine.block(layer, block)[:] = expected[start : start + engine.page]
                else:
                    expected[start : start + engine.page] = engine.block(layer, block)
        return expected, engine.memory.copy()

    before = engine.memory.copy()
    if data.draw(st.booleans(), "load"):
        wanted = loop(to_blocks=True)[1]
        engine.memory[:] = before
        CpuCopier().load(plan, None)
        assert (engine.memory == wanted).all()
        # Layer by layer it is the same.
        engine.memory[:] = before
        for layer in range(engine.layers):
            source, to, lengths = plan.runs(layer)
            copy_runs(to, source, lengths)
        assert (engine.memory == wanted).all()
    else:
        wanted = loop(to_blocks=False)[0]
        CpuCopier().store(plan, None)
        assert (slots == wanted).all()
        assert (engine.memory == before).all()
    # No two runs that follow each other could have been one.
    runs = list(zip(*plan.runs(), strict=True))
    assert not any(a[0] + a[2] == b[0] and a[1] + a[2] == b[1] for a, b in pairwise(runs))


def test_neighbours_are_one_run() -> None:
    engine = Engine(layers=2, blocks=8, page=64, padding=0, inside=False)
    slots = np.zeros(2 * 2 * 2 * 64, np.uint8)
    plan = Plan(engine.pages, [slots.ctypes.data, slots.ctypes.data + 256], [2, 3, 5, 6])
    assert plan.runs()[2] == [128] * 4, "two blocks, of each layer and chunk"
    assert plan.runs(0)[2] == [128] * 2
    assert Plan(engine.pages, [slots.ctypes.data], [3, 2]).runs()[2] == [64] * 4
    # All blocks of a pool, in slots of the same order: a single copy.
    whole = Plan(engine.pages, [slots.ctypes.data], list(range(8)))
    assert whole.runs()[2] == [2 * 8 * 64]


@given(
    runs=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300)), max_size=5),
    base=st.integers(0, 100),
    piece=st.integers(1, 200),
)
def test_runs_are_cut_where_registered_pieces_end(
    runs: list[tuple[int, int]], base: int, piece: int
) -> None:
    slots = [base + start for start, _ in runs]
    blocks = [10_000 * i for i in range(len(runs))]
    lengths = [length for _, length in runs]
    cut = list(zip(*split_runs(slots, blocks, lengths, base, piece), strict=True))
    moved = [(slot + i, block + i) for slot, block, length in cut for i in range(length)]
    assert moved == [
        (slot + i, block + i)
        for slot, block, length in zip(slots, blocks, lengths, strict=True)
        for i in range(length)
    ]
    for slot, _, length in cut:
        assert (slot - base) // piece == (slot + length - 1 - base) // piece


def test_nothing_to_copy_is_no_run() -> None:
    engine = Engine(layers=2, blocks=4, page=64, padding=0, inside=False)
    assert Plan(engine.pages, [0], [-1, -1]).runs() == ([], [], [])


def test_a_block_outside_the_pool_is_refused() -> None:
    engine = Engine(layers=1, blocks=4, page=64, padding=0, inside=False)
    with pytest.raises(UsageError, match=r"0\.\.3"):
        Plan(engine.pages, [0], [4])


def test_a_payload_lies_behind_its_header() -> None:
    pool = Pool.create(1 << 16)
    try:
        pool.array(8192, 8192)[HEADER_BYTES] = 77
        seen: Any = np.zeros(1, np.uint8)
        copy_runs([seen.ctypes.data], [payload_address(pool, 8192)], [1])
        assert seen[0] == 77
    finally:
        pool.close()
    with pytest.raises(UsageError):
        payload_address(pool, 8192)


def test_the_device_decides_the_copier() -> None:
    assert isinstance(make_copier(torch.device("cpu")), CpuCopier)
