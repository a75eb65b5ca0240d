"""One queue per object: who came first goes first, and nobody waits in a circle."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from kvstrata.errors import TierUnavailable
from kvstrata.node.service.turns import Name, Turns

A, B, C = ((name, 0) for name in (b"a", b"b", b"c"))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_an_idle_object_has_no_queue() -> None:
    async def test() -> None:
        turns = Turns()
        with turns.take([A, B, A]) as turn:
            await turn.come()
            assert len(turns) == 2
            assert turns.busy(A)
            assert not turns.busy(C)
        assert len(turns) == 0

    asyncio.run(test())


def test_the_order_is_that_of_asking() -> None:
    async def test() -> None:
        turns, done = Turns(), []

        async def work(number: int, names: list[Name]) -> None:
            with turns.take(names) as turn:
                await turn.come()
                await settle()
                done.append(number)

        asked = [[A], [A, B], [C], [B, C], [A]]
        await asyncio.gather(*[work(number, names) for number, names in enumerate(asked)])
        assert [one for one in done if one in (0, 1, 4)] == [0, 1, 4]
        assert done.index(3) > max(done.index(1), done.index(2))
        assert done.index(2) < done.index(1), "who wants another object goes by"

    asyncio.run(test())


def test_whoever_gives_up_lets_nobody_go_before_those_ahead() -> None:
    async def test() -> None:
        turns, came = Turns(), []

        async def come(name: str, turn: object) -> None:
            with turn:  # type: ignore[attr-defined]
                await turn.come()  # type: ignore[attr-defined]
                came.append(name)

        first = turns.take([A])
        second = asyncio.ensure_future(come("second", turns.take([A])))
        third = asyncio.ensure_future(come("third", turns.take([A])))
        await settle()
        second.cancel()
        await settle()
        assert came == []
        turns.end(first)
        await third
        assert came == ["third"]
        assert len(turns) == 0

    asyncio.run(test())


def test_nobody_waits_behind_one_that_hangs() -> None:
    async def test() -> None:
        turns = Turns()
        hung, other = turns.take([A]), turns.take([B])
        waiting, free = turns.take([A, B]), turns.take([C])
        coming = asyncio.ensure_future(waiting.come())
        await settle()
        hung.hang()
        with pytest.raises(TierUnavailable, match="still hangs"):
            await coming
        turns.end(waiting)
        late = turns.take([A])
        with pytest.raises(TierUnavailable, match="still hangs"):
            await late.come()
        await free.come()
        turns.end(hung)
        await late.come()
        for turn in (late, other, free):
            turns.end(turn)
        assert len(turns) == 0

    asyncio.run(test())


def test_what_is_done_to_all_goes_before_what_is_asked_later() -> None:
    async def test() -> None:
        turns = Turns()
        before = turns.take([A])
        everything = turns.take_all()
        after = turns.take([A])
        assert turns.busy(B)
        await before.come()
        turns.end(before)
        coming = asyncio.ensure_future(after.come())
        await settle()
        assert not coming.done()
        turns.end(everything)
        await coming
        turns.end(after)
        again = turns.take_all()
        again.hang()
        with pytest.raises(TierUnavailable):
            await turns.take([B]).come()

    asyncio.run(test())


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed: int) -> None:
    """Each object is at one's at a time, in the order of asking, and all come to an end."""

    async def test() -> None:
        rng, turns = random.Random(seed), Turns()
        asked: dict[Name, list[int]] = {}
        done: dict[Name, list[int]] = {}
        inside: set[Name] = set()

        async def work(number: int, names: list[Name], cancelled: bool) -> None:
            with turns.take(names) as turn:
                if not cancelled:
                    for name in names:
                        asked.setdefault(name, []).append(number)
                await turn.come()
                assert not inside & set(names)
                inside.update(names)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    inside.difference_update(names)
                for name in names:
                    done.setdefault(name, []).append(number)

        tasks = []
        for number in range(60):
            names, cancelled = rng.sample([A, B, C], rng.randint(1, 3)), rng.random() < 0.2
            task = asyncio.ensure_future(work(number, names, cancelled))
            await asyncio.sleep(0)
            if cancelled:
                task.cancel()
            tasks.append(task)
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for name, numbers in asked.items():
            assert [one for one in done[name] if one in numbers] == numbers
        assert len(turns) == 0

    asyncio.run(asyncio.wait_for(test(), 20))
