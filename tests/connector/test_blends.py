"""Two ranks that put the same prompts together, each with copies in their own time, in threads.

Whatever the ranks' copies do: both compute the same tokens in the same order and end in the same
step, nothing is computed before all that lies before it is there, and all of it is there in the
end.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.connector.test_fronts import Ranks

from kvstrata.blend import BY_DEVIATION, budget
from kvstrata.connectors.vllm.blends import BlendJob, Blends, Ended, Floats
from kvstrata.connectors.vllm.messages import Blend, Piece, Source

PLANS = ("edges", "anchors", "deviation", "share", "random", "all", "none")


def blend(name: str, pieces: list[Piece], plan: str = "none", ratio: float = 0.0, *,
          start: int = 0, first: int = 0, end: int = 96) -> Blend:  # fmt: skip
    return Blend(
        request_id=name, node=b"", sources=[Source(1, [], [])], pieces=pieces,
        tokens=[1000 + i for i in range(end)], table=[int(name[1:])], start=start, first=first,
        plan=plan, ratio=ratio, parts=[0], seed=5,
    )  # fmt: skip


def piece(position: int, count: int, was: int = 500) -> Piece:
    return Piece(0, 0, 0, count, position, was)


class Rank:
    """One rank: what it copied and computed, token by token."""

    def __init__(self, ranks: Ranks | None = None, number: int = 0) -> None:
        self._ranks, self._number = ranks, number
        self.there: dict[int, set[int]] = {}
        self.computed: list[tuple[int, list[int]]] = []
        self.checked: list[tuple[str, range]] = []
        self.seen: dict[str, set[int]] = {}  # of the first layer
        self.fails_at: int | None = None
        self.off: Callable[[int], float] = lambda position: position % 7

    def agree(self, numbers: list[int]) -> list[int]:
        return self._ranks.agree(self._number, numbers) if self._ranks is not None else numbers

    def add_up(self, numbers: Floats) -> Floats:
        if self._ranks is None:
            return numbers
        # What one rank alone sees counts for both.
        return np.asarray(self._ranks.agree(self._number, numbers.tolist()), np.float32)

    def compute(
        self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[int]
    ) -> None:
        load = blocks[0]
        there = self.there.setdefault(load, set())
        assert list(tokens) == [1000 + position for position in positions]
        if self.fails_at in positions:
            raise RuntimeError("out of memory")
        for position in positions:
            assert set(range(position)) <= there, "a hole before it"
            there.add(position)
        self.computed.append((load, list(positions)))

    def deviation(self, blend: Blend, positions: range) -> Floats:
        there = self.seen.setdefault(blend.request_id, set(self.there[blend.table[0]]))
        assert set(range(positions.start)) <= there, "a hole before it, in the first layer"
        there |= set(positions)
        self.checked.append((blend.request_id, positions))
        return np.array([self.off(position) for position in positions], np.float32)

    def copy(self, job: BlendJob, number: int, count: int) -> None:
        """Rows of a piece come."""
        position = job.blend.pieces[number].position
        self.there[job.blend.table[0]] |= set(range(position, position + count))
        job.came([(number, count)])

    def begin(self, one: Blend) -> BlendJob:
        self.there[one.table[0]] = set(range(one.start))
        return BlendJob(one)


def alone(one: Blend, lost: Sequence[int] = (), most_tokens: int = 40) -> tuple[Rank, list[Ended]]:
    """A blend of one rank, whose pieces but some have come at once."""
    rank = Rank()
    blends, job = Blends(rank, rank), rank.begin(one)
    blends.begin(job)
    for number, its in enumerate(one.pieces):
        if number not in lost:
            rank.copy(job, number, its.count)
    ended: list[Ended] = []
    for _ in range(50):
        ended += blends.step(most_tokens)[0]
    assert not blends
    return rank, ended


def positions(rank: Rank) -> list[int]:
    return [position for _, some in rank.computed for position in some]


def test_gaps_are_computed_and_no_more() -> None:
    rank, ended = alone(blend("r1", [piece(10, 30), piece(60, 20)], start=8))
    assert positions(rank) == [8, 9, *range(40, 60), *range(80, 96)]
    assert ended == [Ended("r1", 38, failed=False)]
    assert rank.there[1] == set(range(96))


def test_what_does_not_come_is_a_gap() -> None:
    rank, ended = alone(blend("r1", [piece(0, 30), piece(30, 66)]), lost=[1])
    assert positions(rank) == list(range(30, 96))
    assert ended == [Ended("r1", 66, failed=False)]


def test_rows_that_vllm_has_itself_are_not_waited_for() -> None:
    """Only those behind `start` are copied; what is exact before `first` is not chosen."""
    one = blend("r1", [piece(0, 48, was=0), piece(48, 48)], "all", 1.0, start=16, first=32)
    rank = Rank()
    blends, job = Blends(rank, rank), rank.begin(one)
    blends.begin(job)
    rank.copy(job, 0, 48)
    job._came[0] = 32  # of 48 rows
    rank.copy(job, 1, 48)
    ended = blends.step(100)[0]
    assert positions(rank) == list(range(32, 96))
    assert ended == [Ended("r1", 64, failed=False)]


@pytest.mark.parametrize("most_tokens", [1, 7, 1000])
@pytest.mark.parametrize("plan", PLANS)
def test_slices_are_short_and_ascend(plan: str, most_tokens: int) -> None:
    pieces = [piece(0, 20, was=0), piece(24, 30), piece(54, 42, was=7)]
    one = blend("r1", pieces, plan, 0.5, first=24)
    rank = Rank()
    blends, job = Blends(rank, rank), rank.begin(one)
    job.begin(1)
    blends.begin(job)
    assert blends.step(most_tokens) == ([], False)
    for number, its in enumerate(pieces):
        rank.copy(job, number, its.count)
    job.thread_ended()
    ended: list[Ended] = []
    for _ in range(400):
        some, computed = blends.step(most_tokens)
        ended += some
        assert computed or ended
    assert positions(rank) == sorted(set(positions(rank)))
    assert max(len(some) for _, some in rank.computed) <= most_tokens
    chosen = set(positions(rank)) - set(range(20, 24))
    # They are off by 0 to 6, so 5 and 6 are high, twice ten of the 72.
    assert len(chosen) == (20 if plan == "share" else budget(plan, 0.5, 72))
    assert not chosen & set(range(20))
    assert set(range(20, 24)) <= set(positions(rank))
    assert ended == [Ended("r1", 4 + len(chosen), failed=False)]
    checked = [position for _, some in rank.checked for position in some]
    assert checked == (list(range(20, 96)) if plan in BY_DEVIATION else [])
    if plan in BY_DEVIATION:
        assert all(len(some) <= most_tokens for _, some in rank.checked)
        worst = sorted((-(at % 7), at) for at in range(24, 96))[: len(chosen)]
        assert chosen == {at for _, at in worst}


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 30), (0.2, 14)])
def test_by_a_bound_as_many_are_computed_as_it_takes(ratio: float, count: int) -> None:
    """They are off by 0 to 6, ten of each: 0 to 3 are 60 of 210, and one 4 is too many."""
    pieces = [piece(0, 20, was=0), piece(20, 70)]
    one = replace(blend("r1", pieces, "deviation", ratio, first=20, end=90), bound=0.3)
    rank, ended = alone(one)
    worst = sorted(range(20, 90), key=lambda at: (-(at % 7), at))
    assert positions(rank) == sorted(worst[:count])
    assert ended == [Ended("r1", count, failed=False)]


def test_nothing_is_computed_in_a_full_step() -> None:
    one = blend("r1", [piece(0, 48)])
    rank = Rank()
    blends, job = Blends(rank, rank), rank.begin(one)
    blends.begin(job)
    rank.copy(job, 0, 48)
    for _ in range(3):
        assert blends.step(0) == ([], False)
    assert blends.step(100) == ([Ended("r1", 48, failed=False)], True)


def test_blocks_are_withheld_from_an_aborted_request_while_they_are_copied() -> None:
    rank = Rank()
    blends, job = Blends(rank, rank), rank.begin(blend("r1", [piece(0, 96)]))
    job.begin(2)
    blends.begin(job)
    blends.call_off({"r1", "r2"})
    assert job.wanted
    assert blends.step(10) == ([], False)
    assert not job.wanted
    job.thread_ended()
    assert blends.step(10) == ([], False)
    job.thread_ended()
    assert blends.step(10) == ([Ended("r1", 0, failed=True)], False)
    assert rank.computed == []
    assert not blends


def test_computing_fails(caplog: pytest.LogCaptureFixture) -> None:
    rank = Rank()
    rank.fails_at = 50
    blends, job = Blends(rank, rank), rank.begin(blend("r1", [piece(0, 10)]))
    blends.begin(job)
    rank.copy(job, 0, 10)
    assert blends.step(30) == ([], True)
    assert blends.step(30) == ([Ended("r1", 30, failed=True)], True)
    assert "out of memory" in caplog.text


@pytest.mark.parametrize(
    "pieces",
    [[piece(10, 20), piece(20, 20)], [piece(40, 20), piece(10, 20)], [piece(0, 20, was=-20)]],
)
def test_a_blend_that_makes_no_sense_fails(
    pieces: list[Piece], caplog: pytest.LogCaptureFixture
) -> None:
    rank, ended = alone(blend("r1", pieces))
    assert [one.failed for one in ended] == [True]
    assert rank.computed == []
    assert "r1" in caplog.text


@pytest.mark.parametrize("seed", range(12))
def test_ranks_agree_whatever_their_copies_do(seed: int) -> None:
    draw = random.Random(seed)
    plans = []
    for number in range(3):
        at, pieces = draw.randint(0, 10), []
        while at < 90:
            count = draw.randint(1, 96 - at)
            pieces.append(piece(at, count, draw.randint(0, 900)))
            at += count + draw.choice([0, 0, 5])
        one = blend(f"r{number}", pieces, draw.choice(PLANS), draw.random(),
                    first=draw.choice([0, 16]))  # fmt: skip
        if one.plan == "deviation":
            one = replace(one, bound=draw.choice([None, draw.random()]))
        plans.append((one, draw.randint(0, 10)))
    aborted = {f"r{draw.randint(0, 2)}": draw.randint(3, 20)} if seed % 3 == 2 else {}
    breaks = draw.randint(0, 95) if seed % 4 == 3 else None
    budgets = [draw.choice([0, 3, 20, 100]) for _ in range(2000)]
    ranks = Ranks()
    each = [Rank(ranks, number) for number in range(2)]
    each[0].fails_at = breaks
    each[0].off = lambda position: 3.0 * (position % 5)
    each[1].off = lambda position: 2.0 * (position % 11)
    ends: list[list[tuple[int, Ended]]] = [[], []]
    errors: list[BaseException] = []

    def bring(rank: Rank, job: BlendJob, chance: random.Random) -> None:
        for number, its in enumerate(job.blend.pieces):
            time.sleep(chance.choice([0.0, 0.001, 0.004]))
            if not job.wanted:
                break
            if chance.random() < 0.8:
                rank.copy(job, number, its.count)
        job.thread_ended()

    def run(number: int) -> None:
        rank, threads = each[number], []
        blends = Blends(rank, rank)
        try:
            for step in range(2000):
                for one, begins in plans:
                    if begins == step:
                        job = rank.begin(one)
                        job.begin(1)
                        blends.begin(job)
                        chance = random.Random(f"{seed} {number} {one.request_id}")
                        threads.append(threading.Thread(target=bring, args=(rank, job, chance)))
                        threads[-1].start()
                blends.call_off({name for name, at in aborted.items() if at == step})
                ended, _ = blends.step(budgets[step])
                ends[number] += [(step, one) for one in ended]
                if len(ends[number]) == len(plans):
                    break
                time.sleep(0.0005)
        except BaseException as error:
            errors.append(error)
            ranks._barrier.abort()
        for thread in threads:
            thread.join()

    both = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if errors:
        raise errors[0]
    assert [(step, one.request_id, one.failed) for step, one in ends[0]] == [
        (step, one.request_id, one.failed) for step, one in ends[1]
    ]
    assert len(ends[0]) == len(plans)
    broken = {one.request_id for _, one in ends[0] if one.failed}
    assert len(broken - set(aborted)) <= (breaks is not None) * 3
    for rank in each:
        for one, _ in plans:
            if one.request_id not in broken:
                assert rank.there[one.table[0]] == set(range(96))
    if breaks is None:
        assert each[0].computed == each[1].computed
        assert each[0].checked == each[1].checked
