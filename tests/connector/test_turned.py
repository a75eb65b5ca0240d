"""Rows put together to blocks: where each ends up, how keys are turned, what stays untouched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvstrata.connectors.vllm.copies import CpuCopier
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.payloads import StoredRows
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.connectors.vllm.turned import Share, Sheet, floats, words
from kvstrata.layout import Elements, LayerGroup, native_order

LAYERS, HEADS, DIM, POSITIONS = 3, 2, 32, 4096
DTYPES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


class Table:
    """A rotary embedding of an engine, as far as it is looked at."""

    def __init__(self, width: int, is_neox_style: bool = True, factor: float = 1.0) -> None:
        self.is_neox_style = is_neox_style
        angles = np.arange(POSITIONS)[:, np.newaxis] / 50.0 ** (np.arange(width // 2) / width)
        table = factor * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        self.cos_sin_cache = torch.from_numpy(table.astype(np.float32))


class Memory:
    """An engine's blocks, which begin as noise."""

    def __init__(self, order: str, dtype: str, block_tokens: int, kernel_tokens: int) -> None:
        self.order = native_order(f"vllm/{order}/b{kernel_tokens}/{dtype}")
        self.group = LayerGroup(0, "full", LAYERS, HEADS, DIM, 2, dtype)
        page = self.order.page_bytes(self.group) * block_tokens // kernel_tokens
        self.blocks = np.random.default_rng(0).integers(0, 256, (LAYERS, 40, page), np.uint8)
        self.pages = Pages(
            group=self.group,
            order=self.order,
            layer_names=tuple(f"layer {i}" for i in range(LAYERS)),
            block_tokens=block_tokens,
            page_bytes=page,
            num_blocks=40,
            bases=self.blocks.ctypes.data + np.arange(LAYERS, dtype=np.int64) * 40 * page,
            strides=np.full(LAYERS, page, np.int64),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
        )

    def rows(self, blocks: list[int]) -> Elements:
        """(L, S, H, T, D) of these blocks."""
        some = np.ascontiguousarray(self.blocks[:, blocks])
        native = some.reshape(LAYERS, -1, self.order.page_bytes(self.group))
        rows: Elements = self.order.unpack_layers(native, self.group)
        return rows


def turned_slowly(
    keys: npt.NDArray[Any], shift: int, table: Table, width: int
) -> npt.NDArray[np.float64]:
    """Of (..., D) numbers, by trigonometry alone: rotary embedding is relative."""
    out: npt.NDArray[np.float64] = keys.astype(np.float64)
    for pair in range(width // 2):
        one, two = (pair, pair + width // 2) if table.is_neox_style else (2 * pair, 2 * pair + 1)
        angle = shift / 50.0 ** (pair / width)
        a, b = keys[..., one].astype(np.float64), keys[..., two].astype(np.float64)
        out[..., one] = a * np.cos(angle) - b * np.sin(angle)
        out[..., two] = b * np.cos(angle) + a * np.sin(angle)
    return out


def stored(memory: Memory, rows: Elements, native: bool = False) -> StoredRows:
    """These rows as those of a chunk that has others before and behind them."""
    group, size = memory.group, memory.order.block_tokens
    count = rows.shape[3]
    whole = np.random.default_rng(9).integers(
        0, 1 << 15, group.portable_shape(-(-(count + 9) // size) * size), rows.dtype
    )
    whole[:, :, :, 5 : 5 + count] = rows
    tokens = range(5, 5 + count)
    if not native:
        return StoredRows(group, None, whole, tokens)
    pages = memory.order.pack_layers(whole, group)
    return StoredRows(group, memory.order, pages.reshape(-1), tokens)


def drawn(rng: np.random.Generator, count: int, dtype: str) -> Elements:
    numbers = rng.normal(size=(LAYERS, 2, HEADS, count, DIM)).astype(np.float32)
    rows: Elements = words(numbers, dtype).copy()
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("order", "block_tokens", "kernel_tokens"),
    [("cpu-vec", 32, 32), ("cpu-amx", 32, 32), ("strided-HNC", 16, 16), ("strided-NHC", 32, 16)],
)
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_many_pieces(
    dtype: str, order: str, block_tokens: int, kernel_tokens: int, seed: int
) -> None:
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    width = draw.choice([DIM, DIM // 2])
    table = Table(width, draw.random() < 0.5, draw.choice([1.0, 1.3]))
    # The layer in the middle has no positions in its keys.
    rotary = [Rotary((0, 2), table)]
    memory = Memory(order, dtype, block_tokens, kernel_tokens)
    before = memory.blocks.copy()
    table_of_blocks = draw.sample(range(40), 12)
    span = range(2 * block_tokens, 11 * block_tokens)
    sheet_tokens = block_tokens * draw.choice([1, 4])
    sheet = Sheet(memory.pages, rotary, CpuCopier(), None, table_of_blocks, span, sheet_tokens)
    wanted = {}
    position = span.start
    while position < span.stop:
        position += draw.choice([0, 0, 3, 2 * block_tokens])
        count = min(draw.choice([1, 7, block_tokens, sheet_tokens - 3]), span.stop - position)
        if count <= 0:
            break
        was = draw.choice([position, draw.randrange(POSITIONS - count)])
        rows = drawn(rng, count, dtype)
        sheet.put(stored(memory, rows, draw.choice([True, False])), position, was)
        numbers = floats(rows, dtype)
        right = numbers.astype(np.float64)
        if was != position:
            for layer in (0, 2):
                right[layer, 0] = turned_slowly(numbers[layer, 0], position - was, table, width)
        for i in range(count):
            wanted[position + i] = right[:, :, :, i]
        position += count
    sheet.write()

    found = floats(memory.rows(table_of_blocks), dtype)
    for at, right in wanted.items():
        assert np.abs(found[:, :, :, at] - right).max() < 6 * DTYPES[dtype], at
    touched = {table_of_blocks[at // block_tokens] for at in wanted}
    others = [block for block in range(40) if block not in touched]
    assert (memory.blocks[:, others] == before[:, others]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_prompts_are_mixed_by_their_weights(dtype: str) -> None:
    rng = np.random.default_rng(6)
    table = Table(DIM)
    memory = Memory("cpu-amx", dtype, 32, 32)
    blocks = [5, 9, 2]
    # The layer in the middle has no positions in its keys; one of the prompts had no other place.
    sheet = Sheet(memory.pages, [Rotary((0, 2), table)], CpuCopier(), None, blocks, range(96), 64)
    shares, wanted = [], np.zeros((LAYERS, 2, HEADS, 50, DIM))
    for was, weight in ((700, 0.5), (20, 0.2), (33, 0.3)):
        rows = drawn(rng, 50, dtype)
        shares.append(Share(stored(memory, rows, was > 30), was, weight))
        right = floats(rows, dtype).astype(np.float64)
        for layer in (0, 2):
            right[layer, 0] = turned_slowly(floats(rows, dtype)[layer, 0], 33 - was, table, DIM)
        wanted += weight * right
    before = [floats(one.rows.of_layers(slice(0, LAYERS)), dtype) for one in shares]
    sheet.mix(shares, 33)
    alone = drawn(rng, 7, dtype)
    sheet.put(stored(memory, alone), 83, 83)
    sheet.write()
    found = floats(memory.rows(blocks), dtype)
    assert np.abs(found[:, :, :, 33:83] - wanted).max() < 2 * DTYPES[dtype]
    assert (found[:, :, :, 83:90] == floats(alone, dtype)).all()
    for one, numbers in zip(shares, before, strict=True):
        assert (floats(one.rows.of_layers(slice(0, LAYERS)), dtype) == numbers).all()


def test_one_prompt_with_all_the_weight_is_that_prompt() -> None:
    memory, rng = Memory("cpu-amx", "bfloat16", 32, 32), np.random.default_rng(8)
    rows, other = drawn(rng, 32, "bfloat16"), drawn(rng, 32, "bfloat16")
    sheet = Sheet(memory.pages, [Rotary((0, 1, 2), Table(DIM))], CpuCopier(), None, [4, 6],
                  range(64), 32)  # fmt: skip
    sheet.put(stored(memory, rows), 0, 40)
    shares = [Share(stored(memory, rows), 72, 1.0), Share(stored(memory, other), 9, 0.0)]
    sheet.mix(shares, 32)
    sheet.write()
    found = memory.rows([4, 6])
    assert (found[:, :, :, :32] == found[:, :, :, 32:]).all()


def test_rows_that_are_not_moved_are_the_same_bytes() -> None:
    memory = Memory("cpu-amx", "bfloat16", 32, 32)
    rows = np.random.default_rng(1).integers(0, 1 << 16, (LAYERS, 2, HEADS, 64, DIM), np.uint16)
    sheet = Sheet(memory.pages, [Rotary((0, 1, 2), Table(DIM))], CpuCopier(), None, [7, 3],
                  range(64), 32)  # fmt: skip
    for first in (0, 32):
        sheet.put(stored(memory, rows[:, :, :, first : first + 32]), first, first)
    sheet.write()
    assert (memory.rows([7, 3]) == rows).all()


def test_blocks_as_they_are() -> None:
    """Copied beside rows of the same sheet, which are written later and not over them."""
    memory = Memory("strided-HNC", "bfloat16", 16, 16)
    chunk = np.random.default_rng(2).integers(
        0, 256, (LAYERS, 4, memory.pages.page_bytes), np.uint8
    )
    rows = drawn(np.random.default_rng(3), 16, "bfloat16")
    sheet = Sheet(memory.pages, [], CpuCopier(), None, [9, 8, 7, 6], range(64), 64)
    sheet.put(stored(memory, rows), 0, 0)
    sheet.copy(chunk.ctypes.data, 4, 1, 16, 2)
    sheet.put(stored(memory, rows), 48, 3)
    sheet.write()
    assert (memory.blocks[:, [8, 7]] == chunk[:, 1:3]).all()
    assert (memory.rows([9]) == rows).all()
    assert (memory.rows([6]) == rows).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_rounded_as_torch_rounds(dtype: str) -> None:
    numbers = np.random.default_rng(4).normal(size=10_000).astype(np.float32)
    numbers[:4] = [0.0, -0.0, np.float32(1 + 2**-8), np.float32(1 + 3 * 2**-8)]  # ties
    rounded = torch.from_numpy(numbers).to(getattr(torch, dtype))
    assert (floats(words(numbers.copy(), dtype), dtype) == rounded.float().numpy()).all()
