"""Rows of stored chunks on their way into other blocks, at other positions: keys are turned.

Rows are put together to whole blocks beside the engine's memory and packed as the engine keeps
them, so that nothing of the engine's is read and each block is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstrata.blend.turning import between, rotate
from kvstrata.connectors.vllm.copies import Copier, Plan
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.payloads import StoredRows
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.layout import Elements

Floats = npt.NDArray[np.float32]

CACHE_BYTES = 1 << 19
"""Of some layers' rows, as float32: a part of the cache that a core has to itself."""


class Share(NamedTuple):
    """Rows of some tokens as one prompt had them.

    Args:
        rows: to copy.
        was: position of the first of them there.
        weight: how much they count; of all that are mixed 1 together.
    """

    rows: StoredRows
    was: int
    weight: float


class Sheet:
    """Some whole blocks of a request, of one of a worker's objects; rows come in ascending order.

    They are put together some tokens at a time, and some layers at a time, so that what is worked
    on stays in a core's own cache.

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
        word = f"u{group.item_bytes}"
        # What no rows are for is computed later, so that old ones may lie there.
        self._halves = [np.zeros(group.portable_shape(sheet_tokens), word) for _ in range(2)]
        self._packed = np.empty(pages.native_shape(sheet_tokens), np.uint8)
        self._touched: dict[int, set[int]] = {}  # of sheets with rows, numbers of blocks
        layer_bytes = 4 * group.states * group.num_kv_heads * sheet_tokens * group.head_dim
        step = max(1, CACHE_BYTES // layer_bytes)
        count = group.num_layers
        self._layers = [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def put(self, rows: StoredRows, position: int, was: int) -> None:
        """Take rows; what lies before them is written.

        Args:
            rows: to copy; no more than fit on a sheet.
            position: of the first of them in this prompt; all lie in the span.
            was: of the first of them in the prompt that they were computed in.

        Raises:
            CorruptObject: there is no such position.
        """
        count = len(rows.tokens)
        turns = [] if was == position else self._turns(was, position, count)

        def of_layers(layers: slice) -> Elements:
            some = rows.of_layers(layers)
            return self._turned(some, layers, turns) if turns else some

        self._take(position, count, of_layers)

    def mix(self, shares: Sequence[Share], position: int) -> None:
        """Take the weighted mean of rows of the same tokens; what lies before them is written.

        Turned and added in float32, in the order of the shares, and rounded once.

        Args:
            shares: at least one; as many rows of each, no more than fit on a sheet.
            position: of the first of them in this prompt; all lie in the span.

        Raises:
            CorruptObject: as `put`.
        """
        count, dtype = len(shares[0].rows.tokens), self._pages.group.dtype
        turns = [self._turns(one.was, position, count) for one in shares]

        def of_layers(layers: slice) -> Elements:
            total: Floats | None = None
            for share, turn in zip(shares, turns, strict=True):
                numbers = floats(share.rows.of_layers(layers), dtype)
                for rotary, cos, sin in turn:
                    mine = self._mine(rotary, layers)
                    keys = numbers[mine, 0]
                    rotate(keys, cos, sin, interleaved=rotary.interleaved)
                    numbers[mine, 0] = keys
                numbers *= np.float32(share.weight)
                total = numbers if total is None else total + numbers
            assert total is not None
            return words(total, dtype)

        with np.errstate(all="ignore"):  # stored rows may be no numbers, and then stay none
            self._take(position, count, of_layers)

    def _take(self, position: int, count: int, of_layers: Callable[[slice], Elements]) -> None:
        """Put rows where they belong, some layers at a time."""
        assert count <= self._size
        first, within = divmod(position - self._span.start, self._size)
        for number in [one for one in self._touched if one < first]:
            self._write(number)
        here = min(count, self._size - within)
        one, two = self._halves[first % 2], self._halves[(first + 1) % 2]
        for layers in self._layers:
            some = of_layers(layers)
            one[layers, :, :, within : within + here] = some[:, :, :, :here]
            if here < count:
                two[layers, :, :, : count - here] = some[:, :, :, here:]
        size = self._pages.block_tokens
        for block in range(position // size, (position + count - 1) // size + 1):
            number = (block * size - self._span.start) // self._size
            self._touched.setdefault(number, set()).add(block)

    def write(self) -> None:
        """Write the blocks that have rows; nothing lies here any more."""
        for number in list(self._touched):
            self._write(number)

    def _write(self, number: int) -> None:
        size, touched = self._pages.block_tokens, self._touched.pop(number)
        begin = self._span.start + number * self._size
        count = (min(begin + self._size, self._span.stop) - begin) // size
        order, group = self._pages.order, self._pages.group
        rows, kernel_blocks = self._halves[number % 2], count * size // order.block_tokens
        packed = self._packed
        if kernel_blocks < packed.shape[1]:
            packed = np.empty((len(packed), kernel_blocks, packed.shape[2]), np.uint8)
        for layers in self._layers:
            order.pack_layers(rows[layers, :, :, : count * size], group, packed[layers])
        first = begin // size
        ids = [self._blocks[i] if i in touched else -1 for i in range(first, first + count)]
        self._copier.load(Plan(self._pages, [packed.ctypes.data], ids), self._after)

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

    def _turns(self, was: int, now: int, count: int) -> list[tuple[Rotary, Floats, Floats]]:
        """How so many keys turn, by table."""
        return [
            (one, *between(one.rows(range(was, was + count)), one.rows(range(now, now + count))))
            for one in self._rotary
        ]

    def _turned(
        self, rows: Elements, layers: slice, turns: Sequence[tuple[Rotary, Floats, Floats]]
    ) -> Elements:
        """(layers, S, H, T, D) with keys turned; values are as they are."""
        dtype = self._pages.group.dtype
        turned: Elements = rows.copy()
        for rotary, cos, sin in turns:
            mine = self._mine(rotary, layers)
            keys = floats(rows[mine, 0], dtype)
            rotate(keys, cos, sin, interleaved=rotary.interleaved)
            turned[mine, 0] = words(keys, dtype)
        return turned

    def _mine(self, rotary: Rotary, layers: slice) -> Any:
        """Which of some layers turn by a table, as an index among them."""
        mine = [one - layers.start for one in rotary.layers if layers.start <= one < layers.stop]
        whole = min(layers.stop, self._pages.group.num_layers) - layers.start
        return slice(None) if len(mine) == whole else mine


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
