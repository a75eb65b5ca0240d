"""A chunk's bytes in a slot and in the engine's blocks: of which shape, and how they get there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstrata.connectors.vllm.copies import Plan, payload_address
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.messages import Held, Load, Store
from kvstrata.connectors.vllm.origins import Origins
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.ranks import Shard
from kvstrata.errors import CorruptObject, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.layout import Elements, LayerGroup, NativeOrder
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient


@dataclass(frozen=True)
class StoredRows:
    """Some tokens of a stored chunk, out of whatever order it is kept in.

    Args:
        group: of its layers.
        order: that its bytes are in; None: the portable one.
        payload: the bytes of native pages, or a portable array.
        tokens: their numbers in the chunk.
    """

    group: LayerGroup
    order: NativeOrder | None
    payload: npt.NDArray[Any]
    tokens: range

    def of_layers(self, layers: slice) -> Elements:
        """(layers, S, H, T, D), unsigned integers; not to be written to, perhaps the slot's own."""
        if self.order is None:
            return self.payload[layers, :, :, self.tokens.start : self.tokens.stop]
        size = self.order.block_tokens
        first, last = self.tokens.start // size, -(-self.tokens.stop // size)
        pages = self.payload.reshape(self.group.num_layers, -1, self.order.page_bytes(self.group))
        behind = self.tokens.start - first * size
        rows = self.order.unpack_layers(pages[layers, first:last], self.group)
        return rows[:, :, :, behind : behind + len(self.tokens)]


class Payloads:
    """What one of this worker's objects of a chunk looks like.

    Args:
        pages: the worker's pages of a layer group, or of some heads, proven by their self-test.
        groups: all of the engine's.
        group: the one, or one more shape of it.
        shard: which heads these are, and which object they make.
        origins: hears whose objects are loaded, where that is asked.
    """

    def __init__(
        self,
        pages: Pages,
        groups: Groups,
        group: Group,
        shard: Shard,
        origins: Origins | None = None,
    ) -> None:
        self.pages = pages
        self.part = group.index << 16 | shard.rank
        self.stores = shard.stores
        self.table = group.table
        self.template = _template(pages, groups, group)
        self.needs = group.needs(groups.chunk_tokens)
        self.read_portable = False
        self._origins = origins
        self._per_chunk = groups.num_blocks
        self._column = groups.column(group)
        self._width = groups.width(group)

    def held(self) -> Held:
        """What the scheduler's side must know."""
        return Held(
            self.part, self.pages.order.name, self.template.raw_length, self.needs, self.table
        )

    def plans(
        self, load: Load, client: NodeClient, offsets: list[list[int]], first: int, last: int
    ) -> tuple[list[Plan], list[object]]:
        """How chunks ``first`` to ``last`` of a load get into the blocks of this group.

        Args:
            offsets: the slots of the load's chunks, as far as they are known by now.

        Returns:
            The copies, and what must be kept until they are done.

        Raises:
            CorruptObject: a slot holds something else than what was leased.
            UsageError: there are blocks that no chunk is for.
        """
        if len(load.blocks) != len(load.keys) * self._per_chunk:
            raise UsageError(f"{len(load.blocks)} blocks for {len(load.keys)} chunks to load")
        number = load.parts.index(self.part)
        whole: tuple[list[int], list[int]] = ([], [])  # addresses, blocks
        tail: tuple[list[int], list[int]] = ([], [])
        kept = []
        for i in range(first, last):
            begin = i * self._per_chunk + self._column
            blocks = load.blocks[begin : begin + self._width]
            if max(blocks) < 0:
                continue  # vLLM has it, or a window does not reach it
            is_tail = bool(load.tail_tokens) and i == len(load.keys) - 1
            tokens = load.tail_tokens if is_tail else self.template.num_tokens
            marks = load.tail_marks if is_tail else b""
            header = self._header(client, offsets[i][number], load.keys[i], tokens, marks)
            address, keep = self._payload(client, offsets[i][number], header)
            kept.append(keep)
            if self._origins is not None:
                self._origins.note(load.request_id, header)
            addresses, ids = tail if is_tail else whole
            addresses.append(address)
            ids += blocks[: self._num_blocks(tokens)]
        return [Plan(self.pages, *some) for some in (whole, tail) if some[0]], kept

    def rows(
        self, request_id: str, client: NodeClient, offset: int, key: bytes, tokens: range
    ) -> StoredRows:
        """Some tokens of the chunk in a slot, which a lease holds still.

        Args:
            request_id: for whom.
            client: of the node with the slot.
            offset: of the slot.
            key: the chunk's.
            tokens: their numbers in the chunk.
        Raises:
            CorruptObject: the slot holds something else.
        """
        header = self._header(client, offset, key, self.template.num_tokens, b"")
        if not 0 <= tokens.start < tokens.stop <= header.num_tokens:
            raise CorruptObject(f"there are no tokens {tokens} in {header.num_tokens}")
        if self._origins is not None:
            self._origins.note(request_id, header)
        payload = client.pool.array(offset + HEADER_BYTES, header.raw_length)
        if header.kind == "native":
            return StoredRows(self.pages.group, self.pages.order, payload, tokens)
        self.read_portable = True
        portable = payload.view(f"u{self.pages.group.item_bytes}").reshape(header.shape)
        return StoredRows(self.pages.group, None, portable, tokens)

    def run_of(self, client: NodeClient, offset: int, key: bytes) -> int | None:
        """Address of a chunk's bytes in a slot, if they are in the engine's own order.

        Raises:
            CorruptObject: the slot holds something else.
        """
        header = self._header(client, offset, key, self.template.num_tokens, b"")
        if header.kind == "portable":
            return None
        return payload_address(client.pool, offset)

    def _num_blocks(self, num_tokens: int) -> int:
        if self.template.group_kind == "recurrent":
            return 1
        return -(-num_tokens // self.pages.block_tokens)

    def _shape(self, num_tokens: int) -> tuple[int, ...]:
        """Of the native payload of so many tokens."""
        layers, blocks, *rest = self.template.shape
        if num_tokens != self.template.num_tokens:
            blocks = self._num_blocks(num_tokens)
        return (layers, blocks, *rest)

    def template_of(self, store: Store) -> p.Template:
        """What the headers of a store's objects share."""
        if not store.tail_tokens:
            return self.template
        shape = self._shape(store.tail_tokens)
        raw_length = self.template.raw_length // self.template.shape[1] * shape[1]
        return msgspec.structs.replace(
            self.template,
            num_tokens=store.tail_tokens,
            shape=list(shape),
            raw_length=raw_length,
        )

    def blank_behind(self, payload: npt.NDArray[np.uint8], num_tokens: int) -> None:
        """Zero what a native payload has behind its last token, in place.

        Args:
            payload: whole blocks, as a slot has them, uint8.
            num_tokens: that it has.
        """
        order, group = self.pages.order, self.pages.group
        pages = payload.reshape(group.num_layers, -1, order.page_bytes(group))
        order.blank_behind(pages, num_tokens, group)

    def _header(
        self, client: NodeClient, offset: int, key: bytes, num_tokens: int, marks: bytes
    ) -> ObjectHeader:
        """Of the object in a slot, which is the one that was leased, and can be read."""
        if offset < 0:
            raise CorruptObject("vLLM has blocks for what is not needed at this boundary")
        header = decode(client.pool.view(offset, HEADER_BYTES))
        part = header.group << 16 | header.rank
        if header.key != key or part != self.part or header.dtype != self.template.dtype:
            raise CorruptObject("a slot holds another object than the one that was leased")
        if not header.marks.startswith(marks):
            raise CorruptObject("an object does not begin as the prompt goes on")
        if header.codec != "raw" or header.order not in ("", self.template.order):
            raise CorruptObject(f"a payload in codec {header.codec!r}, order {header.order!r}")
        if header.kind == "native":
            expected = self._shape(num_tokens)
        else:
            expected = self.pages.group.portable_shape(self.template.num_tokens)
        if header.shape != expected or header.num_tokens != num_tokens:
            raise CorruptObject(
                f"a payload of shape {header.shape}, {header.num_tokens} tokens; not {expected}, "
                f"{num_tokens}"
            )
        return header

    def _payload(self, client: NodeClient, offset: int, header: ObjectHeader) -> tuple[int, object]:
        """Address of a chunk's bytes in the engine's own order, and what keeps them there."""
        payload = client.pool.array(offset + HEADER_BYTES, header.raw_length)
        if header.kind == "portable":
            self.read_portable = True
            portable = payload.view(f"u{self.pages.group.item_bytes}").reshape(header.shape)
            payload = self.pages.order.pack_layers(portable, self.pages.group).reshape(-1)
        return int(payload.ctypes.data), payload


def _template(pages: Pages, groups: Groups, group: Group) -> p.Template:
    kept, order = pages.group, pages.order
    if group.kind == "recurrent":
        shape = [kept.num_layers, 1, kept.head_dim]
        raw_length = kept.num_layers * pages.page_bytes
    else:
        layers, blocks, nbytes = pages.native_shape(groups.chunk_tokens)
        shape = [layers, blocks, kept.states, kept.num_kv_heads, order.block_tokens, kept.head_dim]
        raw_length = layers * blocks * nbytes
    return p.Template(
        kind="native",
        order=order.name,
        dtype=kept.dtype,
        shape=shape,
        num_tokens=groups.chunk_tokens,
        raw_length=raw_length,
        chunk_tokens=groups.chunk_tokens,
        group=group.index,
        group_kind=group.kind,
        boundary=group.reach,
    )
