"""What left the tiers is remembered: against a plain history, within its bound."""

from __future__ import annotations

import os
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.node.common.changes import Cause
from kvstrata.node.operating.departures import REMEMBERED, Departures, name_of
from kvstrata.observe.reasons import Why
from kvstrata.parts import at_level
from kvstrata.testing.clock import ManualClock

KEYS = [bytes([number]) * 32 for number in range(4)]
TIERS = ["host", "memory", "disk"]
COARSER = at_level(0, 1)
CAUSES = [cause for cause in Cause if cause is not Cause.SPENT]

steps = st.lists(
    st.one_of(
        st.tuples(st.just("entered"), st.sampled_from(KEYS), st.sampled_from(TIERS)),
        st.tuples(
            st.just("left"), st.sampled_from(KEYS), st.sampled_from(TIERS), st.sampled_from(CAUSES)
        ),
        st.tuples(st.just("found"), st.sets(st.sampled_from(KEYS)), st.sampled_from(TIERS)),
        st.tuples(st.just("emptied"), st.sampled_from(TIERS)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_the_last_departure_of_what_is_nowhere(history: list[tuple[object, ...]]) -> None:
    clock = ManualClock()
    departures = Departures(clock)
    held: dict[str, set[bytes]] = {tier: set() for tier in TIERS}
    last: dict[bytes, tuple[str, Cause, float]] = {}
    for step in history:
        clock.advance(1.0)
        match step:
            case ("entered", bytes(key), str(tier)):
                held[tier].add(key)
                departures.entered(tier, key, 0)
            case ("found", set(keys), str(tier)):
                held[tier] |= keys
                departures.found(tier, [(key, part) for key in keys for part in (0, COARSER)])
            case ("left", bytes(key), str(tier), Cause() as cause) if key in held[tier]:
                held[tier].remove(key)
                last[key] = tier, cause, clock()
                departures.left(tier, key, 0, cause)
            case ("emptied", str(tier)):
                last.update({key: (tier, Cause.CLEARED, clock()) for key in held[tier]})
                held[tier].clear()
                departures.emptied(tier)
    for key in KEYS:
        if not any(key in there for there in held.values()):
            found = departures.of(name_of(key))
            assert (None if found is None else tuple(found)) == last.get(key)


def test_every_cause_has_a_reason() -> None:
    assert {cause.value for cause in CAUSES} <= {why.value for why in Why}


def test_coarser_copies_and_spent_ones_are_none_of_a_chunks() -> None:
    departures = Departures(ManualClock())
    departures.left("disk", KEYS[0], at_level(0, 1), Cause.EVICTED)
    departures.left("host", KEYS[1], 0, Cause.SPENT)
    assert departures.of(name_of(KEYS[0])) is None
    assert departures.of(name_of(KEYS[1])) is None


def test_only_what_left_since() -> None:
    clock = ManualClock()
    departures = Departures(clock)
    clock.advance(5.0)
    departures.left("disk", KEYS[0], 0, Cause.CORRUPT)
    assert departures.since(KEYS[0], clock() - 1.0) is not None
    clock.advance(5.0)
    assert departures.since(KEYS[0], clock() - 1.0) is None


def test_what_left_within_the_same_millisecond_is_no_earlier() -> None:
    clock = ManualClock()
    departures = Departures(clock)
    clock.advance(0.0102)
    begin = clock()
    clock.advance(0.0006)
    departures.left("disk", KEYS[0], 0, Cause.LOST)
    assert departures.since(KEYS[0], begin) is not None


def test_the_oldest_are_forgotten() -> None:
    departures = Departures(ManualClock(), most=3)
    for key in KEYS:
        departures.entered("host", key, 0)
        departures.left("host", key, 0, Cause.EVICTED)
    known = [departures.of(name_of(key)) is not None for key in KEYS]
    assert known == [False, True, True, True]


def test_memory_is_bounded() -> None:
    keys = [os.urandom(32) for _ in range(REMEMBERED + 1000)]
    tracemalloc.start()
    departures = Departures(ManualClock())
    for key in keys:
        departures.entered("host", key, 0)
        departures.left("host", key, 0, Cause.EVICTED)
        departures.entered("disk", key, 0)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert nbytes < 32 << 20
    assert departures.of(name_of(keys[0])) is None
    assert departures.of(name_of(keys[-1])) is not None
