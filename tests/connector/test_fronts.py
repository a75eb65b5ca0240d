"""Two ranks that compute and copy the same loads, each copy in its own time, in threads.

Whatever the ranks' copies do: both compute the same slices in the same order and end in the same
step, no chunk is both copied and computed at once, and all chunks are there in the end.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from kvstrata.connectors.vllm import engine
from kvstrata.connectors.vllm.meeting import Meeting, Meetings
from kvstrata.connectors.vllm.messages import Front, Load

CHUNK, RANKS = 4, 2


class Ranks:
    """What the ranks say to each other, round by round."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=20)
        self._said: list[list[int]] = [[] for _ in range(RANKS)]

    def agree(self, rank: int, numbers: list[int]) -> list[int]:
        self._said[rank] = numbers
        self._barrier.wait()
        assert len({len(one) for one in self._said}) == 1, "they speak of other loads"
        largest = [max(pair) for pair in zip(*self._said, strict=True)]
        self._barrier.wait()
        return largest


class Rank:
    """One rank: which chunk of which load was copied or computed, and when."""

    def __init__(self, ranks: Ranks, number: int, fails_at: int | None = None) -> None:
        self._ranks, self._number = ranks, number
        self._fails_at = fails_at
        self.computed: list[tuple[tuple[int, ...], range]] = []
        self.busy: dict[tuple[int, int], str] = {}
        self.there: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def agree(self, numbers: list[int]) -> list[int]:
        return self._ranks.agree(self._number, numbers)

    def compute(self, tokens: Sequence[int], positions: range, blocks: Sequence[int]) -> None:
        load = blocks[0]
        chunks = range(positions.start // CHUNK, positions.stop // CHUNK)
        assert all((load, i) in self.there for i in range(chunks.start)), "a hole before it"
        if self._fails_at in chunks:
            raise RuntimeError("out of memory")
        self._at(load, chunks, "computed")
        self.computed.append((tuple(blocks), positions))

    def copy(self, load: int, chunks: range) -> None:
        self._at(load, chunks, "copied")

    def _at(self, load: int, chunks: range, how: str) -> None:
        with self._lock:
            for i in chunks:
                assert self.busy.setdefault((load, i), how) == how, "taken twice"
        time.sleep(0.001)
        with self._lock:
            for i in chunks:
                del self.busy[load, i]
                self.there.add((load, i))


def load_of(number: int, chunks: int) -> Load:
    tokens = list(range(chunks * CHUNK))
    return Load(
        request_id=f"r{number}", node=b"", lease=1, first_chunk=0, offsets=[[-1]] * chunks,
        keys=[bytes(32)] * chunks, blocks=[number] * chunks, parts=[0],
        front=Front(tokens, [number], 0),
    )  # fmt: skip


def bring(rank: Rank, meeting: Meeting, load: int, seed: int, fails_before: int | None) -> None:
    """As `backwards.bring`, with chances for arrivals."""
    draw = random.Random(seed)
    time.sleep(draw.random() * 0.005)
    head = min(load, meeting.end - 1)  # the first load has none
    if not meeting.wanted:
        meeting.fail()
        return
    if head:
        for chunk in range(head):
            rank.copy(load, range(chunk, chunk + 1))
    meeting.begin(head)
    while meeting.wants_more:
        time.sleep(draw.choice([0.0, 0.001, 0.004]))
        if fails_before is not None and meeting.taken <= fails_before:
            meeting.fail()
            return
        some = meeting.take(max(0, meeting.taken - draw.randint(1, 3)))
        if some:
            rank.copy(load, some)
        meeting.copied()


@pytest.mark.parametrize("seed", range(12))
def test_ranks_agree_whatever_their_copies_do(seed: int) -> None:
    draw = random.Random(seed)
    plans = [(draw.randint(2, 20), draw.randint(0, 10)) for _ in range(3)]
    fails = {draw.randint(0, 2): draw.randint(1, 12)} if seed % 3 == 1 else {}
    aborted = {f"r{draw.randint(0, 2)}": draw.randint(3, 20)} if seed % 3 == 2 else {}
    broken = draw.randint(0, 6) if seed % 4 == 3 else None
    budget = [draw.choice([0, CHUNK, 3 * CHUNK, 100]) for _ in range(2000)]
    ranks, ends = Ranks(), [[], []]  # type: ignore[var-annotated]
    each = [Rank(ranks, number, broken) for number in range(RANKS)]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        rank, threads = each[number], []
        meetings = Meetings(rank, CHUNK)  # type: ignore[arg-type]
        try:
            for step in range(2000):
                for load, (chunks, begins) in enumerate(plans):
                    if begins == step:
                        meeting = meetings.begin(load_of(load, chunks))
                        # One rank alone fails.
                        bad = fails.get(load) if number == 0 else None
                        mine = (rank, meeting, load, seed * 10 + number, bad)
                        threads.append(threading.Thread(target=bring, args=mine))
                        threads[-1].start()
                meetings.call_off({name for name, at in aborted.items() if at == step})
                ended, _ = meetings.step(budget[step])
                for one in ended:
                    name = int(one.load.request_id[1:])
                    assert all(load != name for load, _ in rank.busy), "still being copied"
                    ends[number].append((step, one.load.request_id, one.computed, not one.met))
                if len(ends[number]) == len(plans):
                    break
                time.sleep(0.0005)
        except BaseException as error:
            errors.append(error)
            ranks._barrier.abort()
        for thread in threads:
            thread.join()

    both = [threading.Thread(target=run, args=(number,)) for number in range(RANKS)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if errors:
        raise errors[0]
    # One whose beginning was not copied by all ranks has failed at another place on each.
    one, two = ([(end[0], end[1], end[3], end[3] or end[2]) for end in some] for some in ends)
    assert one == two
    assert len(one) == len(plans)
    assert each[0].computed == each[1].computed
    for rank, some in zip(each, ends, strict=True):
        for _, name, computed, failed in some:
            load = int(name[1:])
            chunks = computed if failed else plans[load][0]
            assert {(load, i) for i in range(chunks)} <= rank.there
    lost = {name for _, name, _, failed in ends[0] if failed}
    may_fail = {f"r{load}" for load in fails} | set(aborted)
    assert broken is not None or lost <= may_fail


class Config:
    """Says what it is told, and nothing of all else."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        return None


@pytest.mark.parametrize(
    ("positions", "cuts", "runs"),
    [
        ([], set(), []),
        ([5], set(), [(0, 1)]),
        ([0, 1, 2, 3], set(), [(0, 4)]),
        ([0, 1, 2, 3], {2}, [(0, 2), (2, 4)]),
        ([0, 1, 7, 8, 10], {8}, [(0, 2), (2, 3), (3, 4), (4, 5)]),
        ([4, 5], {4, 6}, [(0, 2)]),
    ],
)
def test_neighbours_are_one_run(
    positions: list[int], cuts: set[int], runs: list[tuple[int, int]]
) -> None:
    assert engine._runs(positions, cuts) == runs


def test_forwards_keep_the_engines_bounds() -> None:
    """At most so many tokens and runs in one; what lies further in front is computed before."""
    forward = engine.Forward.__new__(engine.Forward)
    forward._most_tokens, forward._most_runs = 5, 2
    called: list[list[tuple[int, int]]] = []
    forward._forward = lambda *told: called.append(told[3])  # type: ignore[method-assign]
    positions = [0, 1, 2, 10, 11, 12, 20, 21, 22, 23, 24, 25, 26, 30]
    forward.compute(positions, positions, [0])
    assert called == [[(0, 3), (3, 5)], [(5, 6), (6, 10)], [(10, 13), (13, 14)]]
