"""A rig whose worker blends in the rig's arithmetic: what it writes says that it is not exact.

From its first blended token on a request's KV is made of other digests than an exact one's, so
whoever reads a block of it that did not ask for that is seen at once. What the worker is told to
copy is looked up in the node's memory: each row must be of the very token that it is to stand for,
at the position that it is said to have been computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.connector.fake_model import BLOCK, CHUNK, WORD, digests
from tests.connector.gates import TIMEOUT_S
from tests.connector.rig import Rig, _places
from vllm.v1.outputs import ModelRunnerOutput

from kvstrata.connectors.vllm.messages import Blend
from kvstrata.objects import HEADER_BYTES
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ON = {"blend": "on", "hints": "all", "host.capacity": "8MiB"}


@dataclass
class _Under:
    """A blend under way, and the steps that it takes yet."""

    blend: Blend
    steps: int


class BlendRig(Rig):
    """Options as of `Rig`. ``takes``: how many steps the next blend takes; ``fails``: whether."""

    def __init__(self, folder: Path, extra: dict[str, Any] | None = None, **options: Any) -> None:
        self.takes: Callable[[], int] = lambda: 1
        self.fails: Callable[[], bool] = lambda: False
        self.blends: list[Blend] = []  # that the worker was told of
        self.first: dict[str, int] = {}  # of requests that were blended, the first token not exact
        self.rows: dict[bytes, tuple[int, int]] = {}  # of exact KV: token and position
        self._under: list[_Under] = []
        super().__init__(folder, extra={**ON, **(extra or {})}, **options)
        self.side.blending.hear("", "")

    def add(self, prompt: Any, max_tokens: int = 1, **options: Any) -> str:
        name = super().add(prompt, max_tokens, **options)
        self.note(name)
        return name

    def settle(self) -> dict[str, Any]:
        """Signposts are written, too."""
        threads = self.side.blending._signing._threads
        if threads is not None:
            threads.submit(lambda: None).result(TIMEOUT_S)
        return super().settle()

    def note(self, name: str) -> None:
        """Learn what the exact KV of a request's tokens is."""
        tokens = self.tokens[name]
        salt = self.scheduler.requests[name].cache_salt or ""
        for position, row in enumerate(digests(tokens, salt.encode())):
            self.rows[row] = (tokens[position], position)

    def _done(self, name: str, output: Any) -> tuple[list[bytes], int, tuple[list[int], ...]]:
        done, start, blocks = super()._done(name, output)
        return self._mixed(name, done), start, blocks

    def _mixed(self, name: str, exact: list[bytes]) -> list[bytes]:
        """What a request's KV is made of: exact up to its first blended token, then its own."""
        first = self.first.get(name, len(exact))
        own = digests(self.tokens[name][: len(exact)], f"blended {name}".encode())
        return exact[:first] + own[first:]

    def _execute(self, rank: int, output: Any, meta: Any) -> ModelRunnerOutput:
        blends, meta.blends = meta.blends, []
        self.blends += blends
        self._under += [_Under(blend, self.takes()) for blend in blends]
        # As a worker does before anything is written: what is still being stored of these is.
        fresh = {block for one in blends for block in one.table[one.start // BLOCK :]}
        self.workers[rank]._transfers.stores.fence(fresh)
        answer = super()._execute(rank, output, meta)
        heard = answer.kv_connector_output
        assert heard is not None
        for one in list(self._under):
            one.steps -= 1
            if one.steps > 0:
                continue
            self._under.remove(one)
            name = one.blend.request_id
            heard.finished_recving = {*(heard.finished_recving or ()), name}
            if self.fails():
                heard.failed_recving = {*heard.failed_recving, name}
            else:
                self._blend(one.blend)
                heard.kv_connector_worker_meta.blended[name] = self._num_computed(one.blend)
        return answer

    @staticmethod
    def _num_computed(blend: Blend) -> int:
        reused = sum(piece.count for piece in blend.pieces if piece.position >= blend.first)
        copied = sum(piece.count for piece in blend.pieces)
        return len(blend.tokens) - blend.start - copied + round(blend.ratio * reused)

    def _blend(self, blend: Blend) -> None:
        """Look at what it is told to copy, and write what is then there."""
        assert len(blend.tokens) % BLOCK == blend.start % BLOCK == 0
        assert blend.start <= blend.first < len(blend.tokens)
        assert len(blend.table) == len(blend.tokens) // BLOCK
        offsets = [self._slots(source.lease, source.offsets) for source in blend.sources]
        at = blend.start
        for number, piece in enumerate(blend.pieces):
            assert piece.position >= at, "pieces over each other"
            at = piece.position + piece.count
            exact = at <= blend.first
            assert exact or piece.position >= blend.first
            assert not exact or piece.was == piece.position
            beside = blend.beside[number]
            assert not (exact and beside), "what is exact was mixed"
            for one in (piece, *beside):
                assert (one.position, one.count) == (piece.position, piece.count)
                slot = offsets[one.source][one.chunk]
                assert slot >= 0, "what it is made of was let go"
                rows = self._rows_at(slot)[one.row : one.row + one.count]
                for i, row in enumerate(rows):
                    assert self.rows.get(row) == (blend.tokens[one.position + i], one.was + i)
                assert 0 < blend.weights[one.source] <= 1
            rows = self._rows_at(offsets[piece.source][piece.chunk])
            rows = rows[piece.row : piece.row + piece.count]
            assert not exact or rows == self._exact(blend)[piece.position : at]
        assert at <= len(blend.tokens)
        name = blend.request_id
        if name in self.scheduler.requests:
            self.first[name] = blend.first
            done = self._mixed(name, self._exact(blend))
            group = self.groups.each[0]
            memory = self.memories[0]
            where, within = _places(blend.table, blend.start, len(done))
            memory.of(group)[:, where, within] = memory.wanted(done, group)[:, blend.start :]

    def _exact(self, blend: Blend) -> list[bytes]:
        """What its tokens' KV would be made of without it."""
        request = self.scheduler.requests.get(blend.request_id)
        salt = "" if request is None else request.cache_salt or ""
        return digests(blend.tokens, salt.encode())

    def _slots(self, lease: int, offsets: list[list[int]]) -> list[int]:
        """Of each chunk of a lease, once it has arrived."""
        found = [slot for (slot,) in offsets]
        if p.ARRIVING in found:
            assert self.node is not None
            client = self.node.connect()
            have = found.index(p.ARRIVING)
            while have < len(found):
                arrived: p.Arrived = client.await_arrival(lease, have).wait(TIMEOUT_S)
                assert not arrived.failed
                found[have : arrived.ready] = offsets_of(arrived.offsets)
                have = arrived.ready
            client.close()
        return found

    def _rows_at(self, slot: int) -> list[bytes]:
        """What the tokens of a chunk in a slot are made of, by its first layer."""
        client = self.side._lookups.client
        assert client is not None
        payload = bytes(client.pool.view(slot + HEADER_BYTES, CHUNK * WORD))
        words = np.frombuffer(payload, np.uint8) ^ np.uint8(1)
        return [words[i * WORD : (i + 1) * WORD].tobytes() for i in range(CHUNK)]
