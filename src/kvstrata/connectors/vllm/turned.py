"""Rows of stored chunks on their way into other blocks, at other positions: keys are turned.

Rows are put together to whole blocks beside the engine's memory and packed as the engine keeps
them, so that nothing of the engine's is read and each block is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstrata.blend import turn
from kvstrata.connectors.vllm.copies import Copier, Plan
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.layout import Elements

Floats = npt.NDArray[np.float32]


class Sheet:
    """Some whole blocks of a request, of one of a worker's objects; rows come in ascending order.

    Args:
        pages: of the object.
        rotary: of its layers.
        copier: into the engine's blocks.
        after: a mark of the copier's; the blocks may be written from then on.
        blocks: the request's, from its first token on.
        span: the tokens of these blocks that are put together here, whole blocks.
        sheet_tokens: of so many at a time; whole blocks.
    """

    def __init__(
        self,
        pages: Pages,
        rotary: Sequence[Rotary],
        copier: Copier,
        after: Any,
        blocks: Sequence[int],
        span: range,
        sheet_tokens: int,
    ) -> None:
        self._pages, self._rotary = pages, rotary
        self._copier, self._after = copier, after
        self._blocks, self._span = blocks, span
        self._size = sheet_tokens
        group = pages.group
        self._rows = np.zeros(group.portable_shape(sheet_tokens), f"u{group.item_bytes}")
        self._at = span.start  # position of the first row
        self._touched: set[int] = set()  # numbers of blocks that have rows here

    def put(self, rows: Elements, position: int, was: int) -> None:
        """Take rows; those that fill a sheet, and all before, are written.

        Args:
            rows: (L, S, H, T, D), unsigned integers of the element's width; copied.
            position: of the first of them in this prompt; all lie in the span.
            was: of the first of them in the prompt that they were computed in.
        """
        done, count = 0, rows.shape[3]
        while done < count:
            begin = self._span.start + (position - self._span.start) // self._size * self._size
            if begin != self._at:
                self.write()
                self._at = begin
            fit = min(count - done, begin + self._size - position)
            inside = slice(position - begin, position - begin + fit)
            target = self._rows[:, :, :, inside]
            np.copyto(target, rows[:, :, :, done : done + fit])
            if was != position:
                self._turn(target[:, 0], range(was, was + fit), range(position, position + fit))
            size = self._pages.block_tokens
            self._touched.update(range(position // size, (position + fit - 1) // size + 1))
            position, was, done = position + fit, was + fit, done + fit

    def write(self) -> None:
        """Write the blocks that have rows; nothing lies here any more."""
        if not self._touched:
            return
        size = self._pages.block_tokens
        first = self._at // size
        count = (min(self._at + self._size, self._span.stop) - self._at) // size
        packed = self._pages.order.pack_layers(
            self._rows[:, :, :, : count * size], self._pages.group
        )
        ids = [
            self._blocks[number] if number in self._touched else -1
            for number in range(first, first + count)
        ]
        self._copier.load(Plan(self._pages, [packed.ctypes.data], ids), self._after)
        self._rows.fill(0)
        self._touched.clear()

    def copy(self, address: int, chunk_blocks: int, first: int, position: int, count: int) -> None:
        """Copy blocks as they are, at the position that they were computed for.

        Args:
            address: of a chunk's bytes, in the engine's own order.
            chunk_blocks: of the chunk.
            first: number of the first block to copy, in the chunk.
            position: where it goes, the beginning of a block.
            count: of blocks; none of them has rows here.
        """
        begin = position // self._pages.block_tokens
        ids = [-1] * chunk_blocks
        ids[first : first + count] = self._blocks[begin : begin + count]
        self._copier.load(Plan(self._pages, [address], ids), self._after)

    def _turn(self, keys: Elements, was: range, now: range) -> None:
        """In place: (L, H, T, D)."""
        dtype = self._pages.group.dtype
        for rotary in self._rotary:
            if len(rotary.layers) == len(keys):
                numbers = floats(keys, dtype)
            else:
                numbers = floats(keys[list(rotary.layers)], dtype)
            turn(numbers, rotary.rows(was), rotary.rows(now), interleaved=rotary.interleaved)
            if len(rotary.layers) == len(keys):
                keys[...] = words(numbers, dtype)
            else:
                keys[list(rotary.layers)] = words(numbers, dtype)


def floats(elements: Elements, dtype: str) -> Floats:
    """The numbers that elements of a dtype mean; a copy.

    Args:
        elements: unsigned integers of the dtype's width.
        dtype: bfloat16, float16 or float32.
    """
    if dtype == "float32":
        numbers: Floats = elements.copy().view(np.float32)
    elif dtype == "float16":
        numbers = np.ascontiguousarray(elements).view(np.float16).astype(np.float32)
    else:
        wide = np.empty(elements.shape, np.uint32)
        np.left_shift(elements, 16, out=wide, dtype=np.uint32)
        numbers = wide.view(np.float32)
    return numbers


def words(numbers: Floats, dtype: str) -> Elements:
    """The elements of a dtype that mean these numbers, rounded to nearest, ties to even."""
    if dtype == "float32":
        return numbers.view(np.uint32)
    if dtype == "float16":
        return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    up = bits >> 16
    up &= 1
    up += 0x7FFF
    up += bits
    up >>= 16
    return up.astype(np.uint16)
