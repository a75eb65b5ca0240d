"""The tier contract, kept by the simplest tier and the fault wrapper; the wrapper's own rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.errors import TierFull, TierUnavailable, UsageError
from kvstrata.testing.clock import ManualClock
from kvstrata.testing.stores import (
    FAILED,
    HIT,
    MISS,
    PAGE,
    empty,
    filled,
    has,
    object_id,
    outcomes,
    read_one,
    write,
)
from kvstrata.testing.tiers import OwnedTierContract, scan_all
from kvstrata.tiers.base import Limits, Outcome, OwnedTier
from kvstrata.tiers.faulty import Answer, Delay, Effect, FaultyTier, FlipBit, Raise, ShortRead
from kvstrata.tiers.faulty import Verb as FaultyVerb
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.throttled import ThrottledTier


class TestMemoryTier(OwnedTierContract):
    def make_tier(self, folder: Path) -> OwnedTier:
        return MemoryTier()


class TestThrottledTier(OwnedTierContract):
    def make_tier(self, folder: Path) -> OwnedTier:
        return ThrottledTier(MemoryTier(), 1e12)


def test_a_throttled_tier_shares_one_link(clock: ManualClock) -> None:
    tier = ThrottledTier(MemoryTier(), 2 * PAGE, clock=clock, sleep=clock.advance)
    write(tier, [(one, empty(4 * PAGE)) for one in IDS])
    began = clock()
    tier.read(IDS[:1], [empty(4 * PAGE)])
    assert clock() - began == 2.0
    clock.advance(10.0)  # a link does not save up what it did not carry
    tier.set_rate(8 * PAGE)
    began = clock()
    tier.read(IDS[:2], [empty(4 * PAGE), empty(4 * PAGE)])
    assert clock() - began == 1.0


class TestFaultyTierWithoutRules(OwnedTierContract):
    def make_tier(self, folder: Path) -> OwnedTier:
        return FaultyTier(MemoryTier())


class TestFaultyTierHealed(OwnedTierContract):
    def make_tier(self, folder: Path) -> OwnedTier:
        tier = FaultyTier(MemoryTier())
        tier.inject("read", FlipBit())
        tier.inject("write", Raise(TierFull("full")))
        tier.inject("scan", Raise(TierUnavailable("gone")))
        tier.heal()
        return tier


@pytest.mark.parametrize("wrap", [FaultyTier, lambda inner: ThrottledTier(inner, 1e12)])
def test_a_wrapper_says_of_itself_what_is_so_of_the_inner_tier(
    wrap: Callable[[OwnedTier], OwnedTier],
) -> None:
    class Inner(MemoryTier):
        name = "inner"
        limits = Limits(batch_objects=7)
        read_only_reason = "mounted read only"

    tier = wrap(Inner())
    assert (tier.name, tier.limits.batch_objects) == ("inner", 7)
    assert tier.read_only_reason == "mounted read only"
    tier.close()


IDS = [object_id(i) for i in range(4)]
DATA = [bytes(filled(2 * PAGE, i)) for i in range(4)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tier(clock: ManualClock) -> FaultyTier:
    tier = FaultyTier(MemoryTier(), sleep=clock.advance)
    write(tier, [(one, filled(2 * PAGE, i)) for i, one in enumerate(IDS)])
    return tier


def differing_bits(left: bytes, right: bytes) -> int:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).bit_count()


def test_raise_once(tier: FaultyTier) -> None:
    tier.inject("read", Raise(TierUnavailable("boom")), times=1)
    with pytest.raises(TierUnavailable, match="boom"):
        read_one(tier, IDS[0], 2 * PAGE)
    assert read_one(tier, IDS[0], 2 * PAGE) == (HIT, DATA[0])
    assert tier.num_faults == 1


@pytest.mark.parametrize("verb", ["stat", "read", "headers", "write", "delete", "reject", "touch"])
def test_raise_in_every_verb_with_ids(tier: FaultyTier, verb: FaultyVerb) -> None:
    tier.inject(verb, Raise(TierUnavailable(verb)))
    calls: dict[str, Callable[[], object]] = {
        "stat": lambda: has(tier, IDS),
        "read": lambda: tier.read(IDS, [empty(2 * PAGE) for _ in IDS]),
        "headers": lambda: tier.headers(IDS),
        "write": lambda: write(tier, [(IDS[0], filled(PAGE, 9))]),
        "delete": lambda: tier.delete(IDS),
        "reject": lambda: tier.reject(IDS),
        "touch": lambda: tier.touch(IDS),
    }
    for name, call in calls.items():
        if name == verb:
            with pytest.raises(TierUnavailable, match=verb):
                call()
    tier.heal()
    assert [read_one(tier, one, 2 * PAGE)[1] for one in IDS] == DATA


def test_raise_in_clear_leaves_all(tier: FaultyTier) -> None:
    tier.inject("clear", Raise(TierUnavailable("boom")), times=1)
    with pytest.raises(TierUnavailable):
        tier.clear()
    assert has(tier, IDS) == [HIT] * 4
    tier.clear()
    assert has(tier, IDS) == [MISS] * 4


def test_scan_that_breaks_off(tier: FaultyTier) -> None:
    tier.inject("scan", Raise(TierUnavailable("died")))
    with pytest.raises(TierUnavailable, match="died"):
        scan_all(tier)


def test_skip_and_times(tier: FaultyTier) -> None:
    tier.inject("stat", Answer(), skip=2, times=3)
    assert has(tier, [IDS[0]] * 7) == [HIT, HIT, FAILED, FAILED, FAILED, HIT, HIT]


def test_only_some_objects(tier: FaultyTier) -> None:
    tier.inject("read", Answer(Outcome.MISS), when=lambda one: one == IDS[2])
    buffers = [empty(2 * PAGE) for _ in IDS]
    assert outcomes(tier.read(IDS, buffers)) == [HIT, HIT, MISS, HIT]
    assert [bytes(one) for one in buffers] == [DATA[0], DATA[1], bytes(2 * PAGE), DATA[3]]


def test_failed_write_stores_nothing(tier: FaultyTier) -> None:
    tier.inject("write", Answer(), when=lambda one: one == object_id(8))
    objects = [(object_id(i), filled(PAGE, i)) for i in (7, 8, 9)]
    assert write(tier, objects) == [HIT, FAILED, HIT]
    assert has(tier.inner, [one for one, _ in objects]) == [HIT, MISS, HIT]


def test_delay_uses_the_given_sleep(tier: FaultyTier, clock: ManualClock) -> None:
    tier.inject("read", Delay(2.5), times=1)
    assert read_one(tier, IDS[0], 2 * PAGE)[0] is HIT
    assert clock() == 2.5
    read_one(tier, IDS[0], 2 * PAGE)
    assert clock() == 2.5


def test_short_read_zeroes_the_rest(tier: FaultyTier) -> None:
    tier.inject("read", ShortRead(keep=PAGE), times=1)
    assert read_one(tier, IDS[1], 2 * PAGE) == (HIT, DATA[1][:PAGE] + bytes(PAGE))
    assert read_one(tier, IDS[1], 2 * PAGE) == (HIT, DATA[1])
    tier.inject("read", ShortRead(keep=3 * PAGE), times=1)
    assert read_one(tier, IDS[1], 2 * PAGE) == (HIT, DATA[1]), "it was no longer"


def test_flipped_bit_in_a_read(tier: FaultyTier) -> None:
    tier.inject("read", FlipBit(), times=1)
    outcome, data = read_one(tier, IDS[1], 2 * PAGE)
    assert outcome is HIT
    assert differing_bits(data, DATA[1]) == 1
    assert read_one(tier, IDS[1], 2 * PAGE) == (HIT, DATA[1])


def test_flipped_bit_in_a_write_spares_the_callers_buffer(tier: FaultyTier) -> None:
    tier.inject("write", FlipBit(bit=8 * PAGE + 3), times=1)
    data = filled(2 * PAGE, 5)
    assert write(tier, [(object_id(5), data)]) == [HIT]
    assert data == filled(2 * PAGE, 5)
    stored = read_one(tier, object_id(5), 2 * PAGE)[1]
    assert stored[PAGE] ^ data[PAGE] == 1 << 3
    assert differing_bits(stored, bytes(data)) == 1


def test_chances_repeat_with_the_seed() -> None:
    def run(seed: int) -> list[Outcome]:
        tier = FaultyTier(MemoryTier(), seed=seed)
        tier.inject("stat", Answer(), probability=0.5)
        return has(tier, [object_id(i) for i in range(64)])

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert 10 < run(1).count(FAILED) < 54


@pytest.mark.parametrize(
    ("verb", "effect"),
    [
        ("write", ShortRead()),
        ("scan", Answer()),
        ("stat", FlipBit()),
        ("close", Raise(TierUnavailable("close never raises"))),
    ],
)
def test_impossible_rules_are_refused(tier: FaultyTier, verb: FaultyVerb, effect: Effect) -> None:
    with pytest.raises(UsageError, match=verb):
        tier.inject(verb, effect)
