"""Why a match did not find a chunk: what a node says after each history, and how it adds up."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.support.asking import Prompt, a_node, prompt
from tests.support.histories import CASES, Case, Found, History
from tests.support.nodes import clear, store

from kvstrata.errors import TierUnavailable
from kvstrata.observe.reasons import Why
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p

SEEDS = range(2)


@pytest.mark.parametrize("seed", range(6))
def test_chunks_behind_the_first_have_reasons_of_their_own(seed: int) -> None:
    """Those that are there wait for the first; those that left or never came do not."""
    rng = random.Random(seed)

    async def play() -> None:
        async with a_node() as asker:
            whole, stored = prompt(rng, 12), rng.randint(4, 12)
            keys = whole.keys
            await asker.keep(Prompt(whole.tokens[: 128 * stored]))
            first = rng.randrange(stored)
            gone = {first, *(n for n in range(first, stored) if rng.random() < 0.4)}
            await clear(asker.node, asker.client, [keys[number] for number in gone])
            runs: Found = []
            for number in range(first, 12):
                why, tier = ("cleared", "host") if number < stored else ("never stored", "")
                if runs and runs[-1][0] == why:
                    runs[-1] = (why, runs[-1][1] + 1, tier, "")
                else:
                    runs.append((why, 1, tier, ""))
            assert await asker.why(whole) == runs

    asyncio.run(play())


def test_of_a_very_mixed_prompt_the_beginning_is_told() -> None:
    async def play() -> None:
        async with a_node(slots=210) as asker:
            whole = prompt(random.Random(1), 200)
            for number in range(0, 200, 2):
                # The even ones were cleared, the odd ones never stored.
                store(asker.node, asker.client, whole.keys[: number + 1], number)
            await clear(asker.node, asker.client, whole.keys[::2])
            runs = await asker.why(whole)
            assert len(runs) == p.MAX_REASONS
            assert [run[0] for run in runs[:4]] == ["cleared", "never stored"] * 2
            assert runs[-1][1] == 200 - p.MAX_REASONS + 1

    asyncio.run(play())


@pytest.mark.parametrize("off", [False, True])
def test_why_what_is_there_did_not_come(off: bool) -> None:
    """An engine knows only that a load ended early; the node knows how its tier is."""

    async def play() -> None:
        async with a_node((MemoryTier(), 40)) as asker:
            whole = prompt(random.Random(1), 2)
            await asker.keep(whole)
            (backing,) = asker.node.backings
            if off:
                backing.trip(TierUnavailable("no route"))
            failed = {"why": "the load failed", "tokens": 256, "key": whole.keys[0].hex()}
            record = {"request": "a", "prompt_tokens": 256, "seconds": 0.0, "reasons": [failed]}
            asker.node.handle(asker.client, p.Record(record))
            (told,) = asker.node.status(asker.client, p.Status(1)).state["requests"]
            reason = dict(told["reasons"][0])
            expected = ("tier off", backing.state) if off else ("deadline", "load")
            assert (reason["why"], reason["detail"], reason["tier"]) == (*expected, "memory")
            assert "no route" in reason["detail"] or not off

    asyncio.run(play())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_cause_is_explained(case: Case, seed: int, tmp_path: Path) -> None:
    history = History(tmp_path, f"{case.name} {seed}")
    found, expected = asyncio.run(asyncio.wait_for(case.play(history), 30))
    assert found == expected


def test_no_two_causes_could_be_exchanged() -> None:
    """Each cause that a node gives is expected of some history above, by its own name."""
    of_engines = {Why.PARTIAL, Why.LAST, Why.BYPASSED, Why.FAILED, Why.ENGINE}
    assert {why for case in CASES for why in case.causes} == set(Why) - of_engines
    assert len(CASES) >= 40
