"""A chunk's bytes in a slot and in the engine's blocks: of which shape, and how they get there."""

from __future__ import annotations

import msgspec

from kvstrata.connectors.vllm.copies import Plan
from kvstrata.connectors.vllm.messages import Load, Store
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.errors import CorruptObject
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient


class Payloads:
    """What this worker's objects look like.

    Args:
        pages: the worker's pages, proven by their self-test.
        template: what the headers of this worker's whole chunks share.
        rank: this worker's.
    """

    def __init__(self, pages: Pages, template: p.Template, rank: int) -> None:
        self._pages = pages
        self._template = template
        self._rank = rank
        self.read_portable = False

    def plan(
        self, load: Load, client: NodeClient, offsets: list[list[int]], first: int, last: int
    ) -> tuple[Plan, list[object]]:
        """How chunks ``first`` to ``last`` of a load get into their blocks.

        Args:
            offsets: the slots of the load's chunks, as far as they are known by now.

        Returns:
            The copies, and what must be kept until they are done.

        Raises:
            CorruptObject: a slot holds something else than what was leased.
        """
        per_chunk = len(load.blocks) // len(load.keys)
        has_tail = bool(load.tail_tokens) and last == len(load.keys)
        payloads, kept = [], []
        for i in range(first, last):
            tokens = load.tail_tokens if has_tail and i == last - 1 else self._template.num_tokens
            address, keep = self._payload(client, offsets[i][self._rank], load.keys[i], tokens)
            payloads.append(address)
            kept.append(keep)
        blocks = load.blocks[first * per_chunk : last * per_chunk]
        if not has_tail:
            return Plan(self._pages, payloads, blocks), kept
        tail = blocks[-per_chunk:][: self._num_blocks(load.tail_tokens)]
        plan = Plan(self._pages, payloads[-1:], tail)
        if len(payloads) > 1:
            plan = Plan(self._pages, payloads[:-1], blocks[:-per_chunk]).joined(plan)
        return plan, kept

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pages.block_tokens)

    def _shape(self, num_tokens: int) -> tuple[int, ...]:
        """Of the native payload of so many tokens."""
        layers, _, *rest = self._template.shape
        return (layers, self._num_blocks(num_tokens), *rest)

    def template_of(self, store: Store) -> p.Template:
        """What the headers of a store's objects share."""
        if not store.tail_tokens:
            return self._template
        shape = self._shape(store.tail_tokens)
        raw_length = self._template.raw_length // self._template.shape[1] * shape[1]
        return msgspec.structs.replace(
            self._template,
            num_tokens=store.tail_tokens,
            shape=list(shape),
            raw_length=raw_length,
        )

    def _payload(
        self, client: NodeClient, offset: int, key: bytes, num_tokens: int
    ) -> tuple[int, object]:
        """Address of a chunk's bytes in the engine's own order, and what keeps them there."""
        header = decode(client.pool.view(offset, HEADER_BYTES))
        if header.key != key or header.rank != self._rank or header.dtype != self._template.dtype:
            raise CorruptObject("a slot holds another object than the one that was leased")
        if header.codec != "raw" or header.order not in ("", self._template.order):
            raise CorruptObject(f"a payload in codec {header.codec!r}, order {header.order!r}")
        payload = client.pool.array(offset + HEADER_BYTES, header.raw_length)
        group = self._pages.group
        if header.kind == "native":
            expected = self._shape(num_tokens)
        else:
            expected = group.portable_shape(self._template.num_tokens)
        if header.shape != expected or header.num_tokens != num_tokens:
            raise CorruptObject(
                f"a payload of shape {header.shape}, {header.num_tokens} tokens; not {expected}, "
                f"{num_tokens}"
            )
        if header.kind == "portable":
            self.read_portable = True
            portable = payload.view(f"u{group.item_bytes}").reshape(header.shape)
            payload = self._pages.order.pack_layers(portable, group).reshape(-1)
        return int(payload.ctypes.data), payload
