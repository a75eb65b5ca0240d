"""Stored chunks' rows as they arrive, on their way into a blend's blocks; runs in threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvstrata.connectors.vllm.assembling import cut, within
from kvstrata.connectors.vllm.blends import BlendJob
from kvstrata.connectors.vllm.copies import Copier
from kvstrata.connectors.vllm.messages import Blend, Piece
from kvstrata.connectors.vllm.payloads import Payloads
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.connectors.vllm.turned import Share, Sheet
from kvstrata.errors import CorruptObject, KVStrataError, NodeUnavailable
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

SLEEP_S = 0.02
"""For how long one who waits sleeps before it sees that nothing is wanted any more."""


class Gatherer:
    """Puts blends' rows where they belong.

    Args:
        payloads: the worker's objects of a chunk, by their part; of one layer group.
        copier: into the engine's blocks.
        rotary: of the layers.
        chunk_tokens: of a chunk.
    """

    def __init__(
        self,
        payloads: Mapping[int, Payloads],
        copier: Copier,
        rotary: Sequence[Rotary],
        chunk_tokens: int,
    ) -> None:
        self._payloads, self._copier, self._rotary = payloads, copier, rotary
        self._chunk = chunk_tokens

    def spans(self, job: BlendJob) -> list[range]:
        """The tokens that each of the threads copies."""
        start, end, each = job.blend.start, job.end, self._chunk
        middle = start + -(-(end - start) // (2 * each)) * each
        return [one for one in (range(start, min(middle, end)), range(middle, end)) if one]

    def bring(
        self,
        job: BlendJob,
        span: range,
        client: NodeClient | None,
        after: Any,
        deadline: float,
    ) -> None:
        """Copy what belongs into a span of a blend; what does not come is lost; never raises.

        Args:
            job: of the blend.
            span: of its tokens, whole chunks from its start on.
            client: of the node with the leases.
            after: a mark of the copier's; the blocks may be written from then on.
            deadline: of the whole blend, monotonic seconds.
        """
        name = job.blend.request_id
        try:
            if client is None or client.hello.node != job.blend.node:
                raise NodeUnavailable("this worker is not attached to the node of the leases")
            _Bringing(self, job, span, client, after, deadline).run()
        except KVStrataError as error:
            logger.warning("KVStrata: some of request %s is computed: %s", name, error)
        except Exception:
            logger.exception("KVStrata: gathering died of a bug, request %s", name)

    def sheets(self, blend: Blend, span: range, after: Any) -> dict[int, Sheet]:
        """By part."""
        return {
            part: Sheet(
                one.pages, self._rotary, self._copier, after, blend.table, span, self._chunk
            )
            for part, one in self._payloads.items()
        }


class _Bringing:
    """One span of one blend."""

    def __init__(
        self,
        gatherer: Gatherer,
        job: BlendJob,
        span: range,
        client: NodeClient,
        after: Any,
        deadline: float,
    ) -> None:
        self._job, self._blend, self._span = job, job.blend, span
        self._client, self._deadline = client, deadline
        self._payloads = gatherer._payloads
        self._sheets = gatherer.sheets(self._blend, span, after)
        self._offsets = [list(source.offsets) for source in self._blend.sources]
        self._gone: set[int] = set()  # sources of which no more comes

    def run(self) -> None:
        """Piece by piece."""
        came: list[tuple[int, int]] = []
        for number, whole in enumerate(self._blend.pieces):
            piece = within(whole, self._span)
            if piece is None:
                continue
            beside = self._blend.beside[number] if self._blend.beside else []
            some = [piece, *(one for one in (within(p, self._span) for p in beside) if one)]
            slots = [self._slots(one) for one in some]
            if not self._job.wanted:
                return
            there = [one for one in slots if one is not None]
            if len(there) < len(some):
                continue
            try:
                if beside:
                    self._mix(some, there)
                else:
                    self._put(piece, there[0])
            except CorruptObject as error:
                logger.warning(
                    "KVStrata: a chunk of request %s is computed: %s", self._blend.request_id, error
                )
            else:
                came.append((number, piece.count))
        for sheet in self._sheets.values():
            sheet.write()
        self._job.came(came)

    def _slots(self, piece: Piece) -> list[int] | None:
        """Of the piece's chunk, by part, once it is there; None: it does not come."""
        offsets = self._offsets[piece.source]
        while p.ARRIVING in offsets[piece.chunk]:
            if piece.source in self._gone or not self._job.wanted:
                return None
            if not self._arrived(piece.source, offsets):
                self._gone.add(piece.source)
        return offsets[piece.chunk]

    def _arrived(self, source: int, offsets: list[list[int]]) -> bool:
        """Wait for more of a source's chunks; whether any came."""
        have = next(i for i, slots in enumerate(offsets) if p.ARRIVING in slots)
        try:
            call = self._client.await_arrival(self._blend.sources[source].lease, have)
            while call.reply is None and self._job.wanted:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._client.pump(call, min(left, SLEEP_S))
            if call.reply is None and not self._job.wanted:
                call.abandon()
                return False
            arrived: p.Arrived = call.wait(0)
        except KVStrataError as error:
            name = self._blend.request_id
            logger.warning("KVStrata: chunks of request %s are computed: %s", name, error)
            return False
        flat, width = offsets_of(arrived.offsets).tolist(), len(self._blend.parts)
        some = [flat[i : i + width] for i in range(0, len(flat), width)]
        offsets[have : have + len(some)] = some[: len(offsets) - have]
        return bool(some)

    def _put(self, piece: Piece, slots: list[int]) -> None:
        """Take a piece's rows, of each of this worker's objects of the chunk.

        Raises:
            CorruptObject: one of them is not what was leased.
        """
        key = self._blend.sources[piece.source].keys[piece.chunk]
        name = self._blend.request_id
        for part, payloads in self._payloads.items():
            offset, sheet = slots[self._blend.parts.index(part)], self._sheets[part]
            rest = self._copy_whole(payloads, sheet, offset, key, piece)
            if not rest.count:
                continue
            tokens = range(rest.row, rest.row + rest.count)
            rows = payloads.rows(name, self._client, offset, key, tokens)
            sheet.put(rows, rest.position, rest.was)

    def _mix(self, pieces: Sequence[Piece], slots: Sequence[list[int]]) -> None:
        """Take the mean of the same rows as several prompts had them, by their weights.

        Raises:
            CorruptObject: one of the objects is not what was leased.
        """
        blend = self._blend
        total = sum(blend.weights[piece.source] for piece in pieces)
        for part, payloads in self._payloads.items():
            number, shares = blend.parts.index(part), list[Share]()
            for piece, some in zip(pieces, slots, strict=True):
                key = blend.sources[piece.source].keys[piece.chunk]
                tokens = range(piece.row, piece.row + piece.count)
                rows = payloads.rows(blend.request_id, self._client, some[number], key, tokens)
                shares.append(Share(rows, piece.was, blend.weights[piece.source] / total))
            self._sheets[part].mix(shares, pieces[0].position)

    def _copy_whole(
        self, payloads: Payloads, sheet: Sheet, offset: int, key: bytes, piece: Piece
    ) -> Piece:
        """Copy the whole blocks of what does not move; what is left of the piece."""
        size = payloads.pages.block_tokens
        count = piece.count // size
        if piece.was != piece.position or piece.position % size or piece.row % size or not count:
            return piece
        address = payloads.run_of(self._client, offset, key)
        if address is None:
            return piece
        width = payloads.template.num_tokens // size
        sheet.copy(address, width, piece.row // size, piece.position, count)
        return cut(piece, count * size, piece.count)
