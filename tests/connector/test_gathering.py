"""Blends in a worker beside a real node: whatever comes of the stored rows lies where it belongs.

Its model keeps no positions in its keys, so that rows are the same bytes wherever they end up; what
is computed writes a number of its own. `test_turned` has keys that turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.connector.fake_model import BLOCK, CHUNK, digests
from tests.connector.gates import TIMEOUT_S, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_meeting import CountedTier
from tests.connector.test_turned import Table

from kvstrata.connectors.vllm.fronts import Fronts, Turning
from kvstrata.connectors.vllm.gathering import Gatherer
from kvstrata.connectors.vllm.messages import Blend, Piece, Source, StepMetadata, WorkerReport
from kvstrata.connectors.vllm.rotary import Rotary
from kvstrata.connectors.vllm.turned import floats
from kvstrata.keys import KeyChain
from kvstrata.objects import HEADER_BYTES
from kvstrata.wire.client import offsets_of

Make = Callable[..., Rig]

COMPUTED = 0xA5
"""What the forward writes, byte by byte."""
LENGTHS = (4 * CHUNK, 3 * CHUNK)
NUM_BLOCKS, TABLE = 96, list(range(60, 90))


class Computes:
    """A forward; also its proof, and what says how far rows are off."""

    def __init__(self, rig: Rig) -> None:
        self._kv = rig.memories[0].kv
        self.positions: list[int] = []
        self.most_tokens = 2048

    def left(self, num_tokens: int) -> int:
        return self.most_tokens - num_tokens

    def agree(self, numbers: list[int]) -> list[int]:
        return numbers

    def compute(
        self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[int]
    ) -> None:
        for position in positions:
            self._kv[:, blocks[position // BLOCK], position % BLOCK] = COMPUTED
        self.positions += positions

    def fails(self, *_: Any) -> str:
        return ""


class Place:
    """A worker, and two prompts that its node knows."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.worker = rig, rig.workers[0]
        self.forward = Computes(rig)
        stub: Any = self.forward
        self.worker._fronts = Fronts(stub, stub, CHUNK, Turning([], stub, stub))
        self.worker._gatherer = Gatherer(self.worker.payloads, self.worker._copier, [], CHUNK)
        self.prompts = [prompt(length + 5, seed=i) for i, length in enumerate(LENGTHS)]
        rig.warm(*self.prompts)
        rig.memories[0].kv[:] = 0
        lookups = rig.side._lookups
        client = lookups.attached()
        assert client is not None
        self.client, self.lookups = client, lookups

    def source(self, number: int) -> Source:
        """All chunks of a prompt, leased."""
        namespace = self.lookups.namespaces.of(SimpleNamespace(lora_request=None))
        assert namespace is not None
        tokens = self.prompts[number][: LENGTHS[number]]
        keys = KeyChain(self.client.hello.secret, namespace, CHUNK, "").keys(tokens)
        parts = self.lookups.parts
        found = self.client.match(
            keys, parts, self.lookups.orders, self.lookups.lengths, namespace=namespace
        ).wait(TIMEOUT_S)
        offsets = offsets_of(found.offsets).tolist()
        assert len(offsets) == len(keys) * len(parts)
        each = [offsets[i : i + len(parts)] for i in range(0, len(offsets), len(parts))]
        return Source(found.lease, keys, each)

    def begin(self, sources: list[Source], pieces: list[Piece], **more: Any) -> Blend:
        arguments: dict[str, Any] = {
            "tokens": [1] * (10 * CHUNK), "table": TABLE[: 10 * CHUNK // BLOCK], "start": 0,
            "first": 0, "plan": "none", "ratio": 0.0, **more,
        }  # fmt: skip
        blend = Blend("r1", self.client.hello.node, sources, pieces,
                      parts=self.lookups.parts, **arguments)  # fmt: skip
        self.step(StepMetadata(node=blend.node, blends=[blend]))
        return blend

    def step(self, meta: StepMetadata) -> None:
        self.worker.before_step(meta)
        self.worker.bind(meta)
        self.worker.after_forward()

    def end(self) -> tuple[bool, dict[str, int]]:
        """Wait for the blend; whether it failed, and what was reported."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            loaded, failed = self.worker.loads_ended()
            report: WorkerReport = self.worker.report()
            if loaded:
                assert loaded == {"r1"}
                return bool(failed), report.blended
            assert not report.blended
            assert time.monotonic() < deadline, "it hangs"
            self.step(StepMetadata(node=self.client.hello.node))

    def check(self, pieces: Sequence[Piece], lost: Sequence[int] = (), start: int = 0) -> None:
        """Every row is a piece's own, or computed; no other block was touched."""
        kv = self.rig.memories[0].kv
        group = self.rig.groups.each[0]
        wanted = np.full((len(kv), 10 * CHUNK, kv.shape[-1]), COMPUTED, np.uint8)
        for number, piece in enumerate(pieces):
            if number not in lost:
                rows = self.rig.memories[0].wanted(digests(self.prompts[piece.source]), group)
                first = piece.chunk * CHUNK + piece.row
                wanted[:, piece.position : piece.position + piece.count] = rows[
                    :, first : first + piece.count
                ]
        found = kv[:, TABLE[: 10 * CHUNK // BLOCK]].reshape(wanted.shape)
        assert (found[:, start:] == wanted[:, start:]).all()
        assert not found[:, :start].any()
        others = sorted(set(range(NUM_BLOCKS)) - set(TABLE))
        assert not kv[:, others].any()


PIECES = [
    # the exact head: a chunk and a half, as blocks and as rows
    Piece(0, 0, 0, CHUNK, 0, 0),
    Piece(0, 1, 0, CHUNK // 2 + 3, CHUNK, CHUNK),
    # the second prompt's middle, moved by an odd number of tokens
    Piece(1, 0, 7, CHUNK - 7, 71, 7),
    Piece(1, 1, 0, CHUNK, 71 + CHUNK - 7, CHUNK),
    Piece(1, 2, 0, 9, 71 + 2 * CHUNK - 7, 2 * CHUNK),
    # the first one's end, after a gap, twice
    Piece(0, 3, 1, CHUNK - 1, 200, 3 * CHUNK + 1),
    Piece(0, 3, 16, 16, 240, 3 * CHUNK + 16),
]
FIRST = CHUNK + CHUNK // 2 + 3
NUM_GAPS = 10 * CHUNK - sum(piece.count for piece in PIECES)


def make(make_rig: Make, **options: Any) -> Place:
    return Place(make_rig(num_blocks=NUM_BLOCKS, **options))


def test_rows_from_several_prompts(make_rig: Make) -> None:
    place = make(make_rig)
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    assert place.end() == (False, {"r1": NUM_GAPS})
    place.check(PIECES)
    assert place.worker.report().blended == {}


MIXED = {
    # The second prompt's middle with rows of the first: whole ones, and two runs of one chunk.
    2: [Piece(0, 2, 7, CHUNK - 7, 71, 2 * CHUNK + 7)],
    3: [Piece(0, 1, 0, CHUNK, 71 + CHUNK - 7, CHUNK), Piece(0, 0, 0, CHUNK, 71 + CHUNK - 7, 0)],
    6: [Piece(1, 2, 3, 16, 240, 2 * CHUNK + 3)],
}
WEIGHTS = [0.25, 0.625]


def beside() -> list[list[Piece]]:
    return [MIXED.get(number, []) for number in range(len(PIECES))]


def test_rows_of_several_prompts_are_mixed(make_rig: Make) -> None:
    place = make(make_rig)
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST, beside=beside(),
                weights=WEIGHTS)  # fmt: skip
    assert place.end() == (False, {"r1": NUM_GAPS})
    memory, group = place.rig.memories[0], place.rig.groups.each[0]
    found = memory.kv[:, TABLE[: 10 * CHUNK // BLOCK]].reshape(len(memory.kv), 10 * CHUNK, -1)

    def numbers(rows: Any) -> Any:
        return floats(np.ascontiguousarray(rows).view(np.uint16), "bfloat16")

    for number, more in MIXED.items():
        each = [PIECES[number], *more]
        total = sum(WEIGHTS[piece.source] for piece in each)
        mean: Any = 0
        for piece in each:
            rows = memory.wanted(digests(place.prompts[piece.source]), group)
            some = numbers(rows[:, piece.chunk * CHUNK + piece.row :][:, : piece.count])
            with np.errstate(all="ignore"):  # digests, some of which are no numbers
                mean = mean + np.float32(WEIGHTS[piece.source] / total) * some
        span = slice(each[0].position, each[0].position + each[0].count)
        told = numbers(found[:, span])
        sound = np.isfinite(mean)
        assert sound.mean() > 0.9
        np.testing.assert_allclose(told[sound], mean[sound], rtol=0.01)


def test_what_is_mixed_of_what_does_not_come_is_computed(make_rig: Make) -> None:
    place = make(make_rig)
    sources = [place.source(0), place.source(1)]
    sources[0].keys[0] = bytes(32)  # a part of what is mixed into the fourth piece, and the first
    place.begin(sources, PIECES, first=FIRST, beside=beside(), weights=WEIGHTS)
    lost = PIECES[0].count + PIECES[3].count
    assert place.end() == (False, {"r1": NUM_GAPS + lost})
    assert set(range(PIECES[3].position, PIECES[3].position + CHUNK)) <= {*place.forward.positions}


@pytest.mark.parametrize(("was", "moves"), [(BLOCK, True), (4 * BLOCK, False)])
def test_whole_blocks_are_turned_if_they_move(make_rig: Make, was: int, moves: bool) -> None:
    place = make(make_rig)
    rotary = [Rotary((0, 1), Table(2))]
    place.worker._gatherer = Gatherer(place.worker.payloads, place.worker._copier, rotary, CHUNK)
    position = 4 * BLOCK
    piece = Piece(0, was // CHUNK, was % CHUNK, BLOCK, position, was)
    place.begin([place.source(0)], [piece])
    assert place.end()[0] is False
    group = place.rig.groups.each[0]
    rows = place.rig.memories[0].wanted(digests(place.prompts[0]), group)[:, was : was + BLOCK]
    found = place.rig.memories[0].kv[:, TABLE[position // BLOCK]]
    half = found.shape[-1] // 2
    assert (found[..., half:] == rows[..., half:]).all(), "values have no position"
    assert (found[..., :half] != rows[..., :half]).any() == moves


def test_what_vllm_has_itself_is_left_alone(make_rig: Make) -> None:
    place = make(make_rig)
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST, start=2 * BLOCK)
    assert place.end() == (False, {"r1": NUM_GAPS})
    place.check(PIECES, start=2 * BLOCK)


def test_chunks_on_their_way(make_rig: Make) -> None:
    """Each source at its own pace; nothing is computed before they have come."""
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier))
    place.rig.drop_host()
    tier.shut()
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    for _ in range(6):
        tier.let(1)
        place.step(StepMetadata(node=place.client.hello.node))
        assert place.worker.loads_ended() == (set(), set())
        assert place.forward.positions == []
    tier.open()
    assert place.end() == (False, {"r1": NUM_GAPS})
    place.check(PIECES)


def test_chunks_that_do_not_come(make_rig: Make) -> None:
    """Those behind a chunk that cannot be read are computed; the other source's are there."""
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier))
    place.rig.drop_host()
    sources = [place.source(0)]
    place.rig.until(lambda: tier.num_reads == 4)
    tier.broken = {5}
    tier.delay = lambda: 0.02
    sources.append(place.source(1))
    place.begin(sources, PIECES, first=FIRST)
    failed, blended = place.end()
    assert not failed
    lost = [3, 4]
    assert blended == {"r1": NUM_GAPS + sum(PIECES[number].count for number in lost)}
    place.check(PIECES, lost)


def test_what_is_mixed_of_what_does_not_arrive_is_computed(make_rig: Make) -> None:
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier))
    place.rig.drop_host()
    sources = [place.source(0)]
    place.rig.until(lambda: tier.num_reads == 4)
    tier.broken = {5}  # the second prompt's second chunk: neither it nor the third one comes
    tier.delay = lambda: 0.02
    sources.append(place.source(1))
    place.begin(sources, PIECES, first=FIRST, beside=beside(), weights=WEIGHTS)
    lost = sum(PIECES[number].count for number in (3, 4, 6))
    assert place.end() == (False, {"r1": NUM_GAPS + lost})


def test_a_deadline_that_passes(make_rig: Make) -> None:
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier), extra={"deadlines.load": "300ms"})
    place.rig.drop_host()
    tier.shut()
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    assert place.end() == (False, {"r1": 10 * CHUNK})
    place.check(PIECES, range(len(PIECES)))
    tier.open()


@pytest.mark.parametrize("number", [0, 3])
def test_a_slot_that_holds_something_else(make_rig: Make, number: int) -> None:
    place = make(make_rig)
    sources = [place.source(0), place.source(1)]
    piece = PIECES[number]
    sources[piece.source].keys[piece.chunk] = bytes(32)
    place.begin(sources, PIECES, first=FIRST)
    assert place.end() == (False, {"r1": NUM_GAPS + piece.count})
    place.check(PIECES, [number])


def test_a_node_that_dies(make_rig: Make) -> None:
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier))
    place.rig.drop_host()
    tier.shut()
    tier.let(3)
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    tier.open()
    place.rig.stop_node()
    failed, blended = place.end()
    assert not failed
    assert blended["r1"] >= NUM_GAPS


def test_another_nodes_leases(make_rig: Make) -> None:
    place = make(make_rig)
    sources = [place.source(0), place.source(1)]
    blend = Blend("r1", b"another", sources, PIECES, [1] * (10 * CHUNK),
                  TABLE[: 10 * CHUNK // BLOCK], 0, 0, "none", 0.0, place.lookups.parts)  # fmt: skip
    place.step(StepMetadata(node=place.client.hello.node, blends=[blend]))
    assert place.end() == (False, {"r1": 10 * CHUNK})


def test_a_request_that_is_aborted(make_rig: Make) -> None:
    """Its blocks come back once nothing writes to them; nothing is computed for it."""
    tier = CountedTier()
    place = make(make_rig, make_node=tiered(tier))
    place.rig.drop_host()
    tier.shut()
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    place.step(StepMetadata(node=place.client.hello.node, called_off={"r1"}))
    assert place.end() == (True, {})
    assert place.forward.positions == []
    tier.open()


def test_a_worker_that_cannot_blend_says_so_at_once(make_rig: Make) -> None:
    place = make(make_rig)
    place.worker._gatherer = None
    place.begin([place.source(0), place.source(1)], PIECES, first=FIRST)
    assert place.end() == (True, {})


def test_stored_bytes_are_not_written_over_in_place(make_rig: Make) -> None:
    """Rows are copied out of slots; what others read there stays as it is."""
    place = make(make_rig)
    sources = [place.source(0), place.source(1)]
    before = [
        place.client.pool.array(slot + HEADER_BYTES, 256).tobytes()
        for source in sources
        for (slot,) in source.offsets
    ]
    place.begin(sources, PIECES, first=FIRST)
    place.end()
    assert before == [
        place.client.pool.array(slot + HEADER_BYTES, 256).tobytes()
        for source in sources
        for (slot,) in source.offsets
    ]
