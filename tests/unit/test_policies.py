"""Each policy against the shared contract, a model, and what is particular to it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstrata.errors import ConfigError, UsageError
from kvstrata.policies import LRU, POLICIES, S3FIFO, CostAware, Policy, create_policy
from kvstrata.policies.base import PRIORITIES
from kvstrata.policies.cost import LOOKS_PER_POP
from kvstrata.policies.lru import ROUNDS_PER_POP
from kvstrata.policies.s3fifo import TURNS_PER_POP
from kvstrata.testing.clock import ManualClock
from kvstrata.testing.policies import NBYTES, PolicyContract, anything, key


class TestLRUContract(PolicyContract):
    def make_policy(self, capacity_bytes: int, clock: Callable[[], float]) -> Policy:
        return create_policy("lru", capacity_bytes, clock)


class TestS3FIFOContract(PolicyContract):
    def make_policy(self, capacity_bytes: int, clock: Callable[[], float]) -> Policy:
        return create_policy("s3fifo", capacity_bytes, clock)


class TestCostAwareContract(PolicyContract):
    def make_policy(self, capacity_bytes: int, clock: Callable[[], float]) -> Policy:
        return create_policy("cost", capacity_bytes, clock)


def test_names() -> None:
    assert list(POLICIES.items()) == [("lru", LRU), ("s3fifo", S3FIFO), ("cost", CostAware)]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fifo', expected one of cost, lru, s3fifo"):
        create_policy("fifo", 1000)


@pytest.mark.parametrize("name", POLICIES)
def test_capacity_must_be_positive(name: str) -> None:
    with pytest.raises(UsageError):
        create_policy(name, 0)


def test_manual_clock() -> None:
    clock = ManualClock(5.0)
    clock.advance(1.5)
    assert clock() == 6.5
    with pytest.raises(UsageError):
        clock.advance(-1.0)


class PolicyMachine(RuleBasedStateMachine):
    """A random history against a dictionary in order of last use."""

    name = ""
    prioritised = True
    small_keys = st.integers(0, 20).map(key)

    def __init__(self) -> None:
        super().__init__()
        self.policy = create_policy(self.name, 8 * NBYTES, ManualClock())
        self.model: dict[bytes, int] = {}
        self.leased: set[bytes] = set()
        self.priorities: dict[bytes, int] = {}

    @rule(one=small_keys, nbytes=st.integers(1, 2 * NBYTES), cost=st.floats(0, 10),
          priority=st.sampled_from(PRIORITIES))  # fmt: skip
    def insert(self, one: bytes, nbytes: int, cost: float, priority: int) -> None:
        priority *= self.prioritised
        self.policy.insert(one, nbytes, cost, priority)
        self.priorities[one] = priority or self.priorities.get(one, 0)
        self.model.pop(one, None)
        self.model[one] = nbytes

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.model)))
        self.policy.touch(one)
        self.model[one] = self.model.pop(one)

    @rule(one=small_keys)
    def remove(self, one: bytes) -> None:
        self.policy.remove(one)
        self.model.pop(one, None)
        self.priorities.pop(one, None)

    @rule(one=small_keys)
    def lease_or_release(self, one: bytes) -> None:
        self.leased ^= {one}
        if one not in self.leased:
            self.policy.unpark(one)

    @rule()
    def evict(self) -> None:
        candidates = [one for one in self.model if one not in self.leased]
        victim = self.policy.evict(lambda one: one not in self.leased)
        if victim is None:
            assert not candidates
            return
        assert victim in candidates
        self.check_victim(victim, candidates)
        del self.model[victim], self.priorities[victim]

    def check_victim(self, victim: bytes, candidates: list[bytes]) -> None:
        """Candidates come in order of last use."""

    @invariant()
    def agrees(self) -> None:
        assert len(self.policy) == len(self.model)
        assert sorted(self.policy.keys()) == sorted(self.model)
        assert all(one in self.policy for one in self.model)
        assert self.policy.total_bytes == sum(self.model.values())
        for number in range(21):
            assert self.policy.priority_of(key(number)) == self.priorities.get(key(number), 0)
        self.policy.check_integrity()


class LRUMachine(PolicyMachine):
    name = "lru"
    prioritised = False

    def check_victim(self, victim: bytes, candidates: list[bytes]) -> None:
        assert victim == candidates[0]

    @invariant()
    def order_is_exact(self) -> None:
        assert list(self.policy.keys()) == list(self.model)


class PrioritisedLRUMachine(PolicyMachine):
    name = "lru"


class S3FIFOMachine(PolicyMachine):
    name = "s3fifo"


class CostMachine(PolicyMachine):
    name = "cost"


TestLRUHistory = LRUMachine.TestCase
TestPrioritisedLRUHistory = PrioritisedLRUMachine.TestCase
TestPrioritisedLRUHistory.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None
)
TestS3FIFOHistory = S3FIFOMachine.TestCase
TestCostHistory = CostMachine.TestCase
TestLRUHistory.settings = TestS3FIFOHistory.settings = TestCostHistory.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None
)


def fill(policy: Policy, numbers: range) -> list[bytes]:
    """Insert keys, evicting as a node would; return the victims."""
    victims = []
    for i in numbers:
        while policy.total_bytes + NBYTES > policy.capacity_bytes:
            victim = policy.evict(anything)
            assert victim is not None
            victims.append(victim)
        policy.insert(key(i), NBYTES)
    return victims


class TestLRU:
    def test_a_use_saves(self) -> None:
        policy = LRU(100 * NBYTES)
        fill(policy, range(4))
        policy.touch(key(0))
        policy.insert(key(1), NBYTES)
        assert [policy.evict(anything) for _ in range(4)] == [key(2), key(3), key(0), key(1)]

    @pytest.mark.parametrize("touch", [LRU.touch, lambda policy, one: policy.touch_all([one])])
    def test_a_priority_is_so_many_rounds_and_a_use_gives_them_back(
        self, touch: Callable[[LRU, bytes], None]
    ) -> None:
        policy = LRU(100 * NBYTES)
        policy.insert(key(0), NBYTES, 0.0, 2)
        usual = iter(range(1, 100))
        for uses in range(2):
            for _ in range(2):
                policy.insert(key(one := next(usual)), NBYTES)
                assert policy.evict(anything) == key(one), "it goes round"
            if not uses:
                touch(policy, key(0))
        policy.insert(key(next(usual)), NBYTES)
        assert policy.evict(anything) == key(0)

    def test_a_touch_of_many_finds_those_that_stand_apart(self) -> None:
        """Keys that go first, and those that a walk has passed."""
        policy = LRU(100 * NBYTES)
        fill(policy, range(4))
        policy.insert(key(4), NBYTES, 0.0, -1)
        policy.insert(key(5), NBYTES, 0.0, -1)
        policy.touch_all([key(4), key(9)])
        assert [policy.evict(anything) for _ in range(2)] == [key(5), key(4)]
        walk = policy.walk()
        assert [next(walk) for _ in range(2)] == [key(0), key(1)]
        policy.touch_all([key(0), key(9)])
        list(walk)
        policy.check_integrity()
        assert [policy.evict(anything) for _ in range(4)] == [key(1), key(2), key(3), key(0)]

    def test_one_eviction_is_bounded(self) -> None:
        policy = LRU(100 * NBYTES)
        for i in range(4 * ROUNDS_PER_POP):
            policy.insert(key(i), NBYTES, 0.0, 3)
        assert policy.evict(anything) == key(ROUNDS_PER_POP)
        policy.check_integrity()


class TestS3FIFO:
    def test_a_scan_does_not_push_out_what_is_used(self) -> None:
        policy = S3FIFO(100 * NBYTES)
        fill(policy, range(50))
        for _ in range(2):
            for i in range(50):
                policy.touch(key(i))
        fill(policy, range(1000, 2000))
        assert all(key(i) in policy for i in range(50))

    def test_one_use_in_the_small_queue_is_not_enough(self) -> None:
        policy = S3FIFO(10 * NBYTES)
        policy.insert(key(0), NBYTES)
        policy.touch(key(0))
        assert fill(policy, range(1, 11)) == [key(0)]

    def test_a_ghost_returns_to_main(self) -> None:
        policy = S3FIFO(10 * NBYTES)
        assert fill(policy, range(11)) == [key(0)]
        fill(policy, range(1))  # back from the dead
        fill(policy, range(100, 130))
        assert key(0) in policy

    def test_ghosts_are_forgotten(self) -> None:
        policy = S3FIFO(10 * NBYTES)
        fill(policy, range(100))
        fill(policy, range(1))  # long dead
        assert key(0) in fill(policy, range(200, 230))

    def test_uses_count_to_three(self) -> None:
        policy = S3FIFO(100 * NBYTES)
        fill(policy, range(2))
        for _ in range(9):
            policy.touch(key(0))
            policy.check_integrity()
        for _ in range(2):
            policy.touch(key(1))
        # Both moved to main without their uses; the older goes first.
        assert [policy.evict(anything) for _ in range(2)] == [key(0), key(1)]

    def test_a_use_in_main_is_a_second_chance(self) -> None:
        policy = S3FIFO(100 * NBYTES)
        fill(policy, range(3))
        for _ in range(2):
            for i in range(3):
                policy.touch(key(i))
        policy.insert(key(3), NBYTES)
        assert policy.evict(lambda one: one == key(3)) == key(3)  # the others pass to main
        policy.unpark(key(1))
        policy.unpark(key(2))
        policy.touch(key(0))
        assert [policy.evict(anything) for _ in range(3)] == [key(1), key(2), key(0)]

    def test_a_use_of_one_of_priority_gives_its_rounds_back(self) -> None:
        policy = S3FIFO(10 * NBYTES)

        def proven(*numbers: int) -> None:
            for number in numbers:
                policy.insert(key(number), NBYTES, 0.0, 1 if number == 0 else 0)
                policy.touch(key(number))
                policy.touch(key(number))

        proven(0, 1)
        fill(policy, range(2, 4))
        # Two are in main now, and the first of them has gone round.
        assert [policy.evict(anything) for _ in range(2)] == [key(2), key(1)]
        policy.touch(key(0))
        proven(4, 5)
        assert [policy.evict(anything) for _ in range(2)] == [key(3), key(4)], "it was used"
        proven(6)
        assert policy.evict(anything) == key(5), "it has its round again"
        proven(7)
        assert policy.evict(anything) == key(0)

    def test_what_was_of_low_priority_and_is_not_comes_anew(self) -> None:
        policy = S3FIFO(100 * NBYTES)
        policy.insert(key(0), NBYTES, 0.0, -1)
        policy.insert(key(1), NBYTES)
        policy.insert(key(0), 2 * NBYTES, 0.0, 1)
        policy.check_integrity()
        assert [policy.evict(anything) for _ in range(2)] == [key(1), key(0)]

    def test_one_eviction_is_bounded(self) -> None:
        policy = S3FIFO(100 * NBYTES)
        for i in range(2 * TURNS_PER_POP):
            policy.insert(key(i), NBYTES)
        for i in range(2 * TURNS_PER_POP):
            policy.touch(key(i))
            policy.touch(key(i))
        assert policy.evict(anything) == key(TURNS_PER_POP)
        policy.check_integrity()


class TestCostAware:
    def test_cheap_to_recompute_goes_first(self) -> None:
        policy = CostAware(100 * NBYTES)
        for i, cost in enumerate([3.0, 1.0, 2.0]):
            policy.insert(key(i), NBYTES, cost)
        assert [policy.evict(anything) for _ in range(3)] == [key(1), key(2), key(0)]

    def test_large_goes_first_at_equal_cost(self) -> None:
        policy = CostAware(100 * NBYTES)
        for i, nbytes in enumerate([10, 30, 20]):
            policy.insert(key(i), nbytes, 1.0)
        assert [policy.evict(anything) for _ in range(3)] == [key(1), key(2), key(0)]

    @pytest.mark.parametrize(("priority", "cost"), [(-1, 1 / 4), (1, 4.0), (2, 16.0), (3, 64.0)])
    def test_a_priority_weighs_as_a_cost(self, priority: int, cost: float) -> None:
        for other, first in ((0.9 * cost, 1), (1.1 * cost, 0)):
            policy = CostAware(100 * NBYTES)
            policy.insert(key(0), NBYTES, 1.0, priority)
            policy.insert(key(1), NBYTES, other)
            assert policy.evict(anything) == key(first)
            assert policy.cost_of(key(0)) in (0.0, 1.0), "what it costs is not what it counts"

    def test_each_use_adds(self) -> None:
        policy = CostAware(100 * NBYTES)
        policy.insert(key(0), NBYTES, 1.0)
        policy.insert(key(1), NBYTES, 2.5)
        policy.touch(key(0))
        policy.touch(key(0))
        assert policy.evict(anything) == key(1)

    def test_a_fall_of_cost_counts(self) -> None:
        policy = CostAware(100 * NBYTES)
        policy.insert(key(0), NBYTES, 100.0)
        policy.insert(key(1), NBYTES, 10.0)
        policy.insert(key(0), NBYTES, 1.0)
        assert policy.evict(anything) == key(0)
        policy.check_integrity()

    def test_a_change_of_cost_keeps_the_uses(self) -> None:
        policy = CostAware(100 * NBYTES)
        policy.insert(key(0), NBYTES, 1.0)
        policy.touch(key(0))
        policy.insert(key(0), NBYTES, 2.0)  # third use: 6 in all
        policy.insert(key(1), NBYTES, 5.0)
        assert policy.evict(anything) == key(1)

    @pytest.mark.parametrize("first", ["known", "unknown"])
    def test_an_unknown_cost_is_taken_for_the_typical_one(self, first: str) -> None:
        """Whatever a scan enters, before or after costs are known: dearer than the cheap ones."""
        policy = CostAware(100 * NBYTES)
        keys = [key(0), key(1)] if first == "unknown" else [key(2), key(3)]
        for one in keys:
            policy.insert(one, NBYTES, 0.0 if first == "unknown" else 0.002)
        for number, cost in enumerate([0.001, 0.2]):
            policy.insert(key(10 + number), NBYTES, cost)
        if first == "known":
            policy.insert(key(0), NBYTES)
            policy.insert(key(1), NBYTES)
        order = [policy.evict(anything) for _ in range(len(policy))]
        assert order == [key(10), *([key(2), key(3)] if first == "known" else []),
                         key(0), key(1), key(11)]  # fmt: skip

    def test_where_none_is_known_the_oldest_goes(self) -> None:
        policy = CostAware(100 * NBYTES)
        for number in range(5):
            policy.insert(key(number), NBYTES + 100 * number)
        policy.touch(key(0))
        assert [policy.evict(anything) for _ in range(5)] == [key(n) for n in (1, 2, 3, 4, 0)]

    def test_a_cost_that_is_known_stays_known(self) -> None:
        policy = CostAware(100 * NBYTES)
        policy.insert(key(0), NBYTES, 3.0)
        policy.insert(key(0), NBYTES)
        assert (policy.cost_of(key(0)), policy.cost_of(key(1))) == (3.0, 0.0)
        policy.insert(key(0), NBYTES, 2.0)
        assert policy.cost_of(key(0)) == 2.0
        policy.check_integrity()

    def test_the_dear_go_too_if_nobody_uses_them(self) -> None:
        policy = CostAware(10 * NBYTES)
        policy.insert(key(0), NBYTES, 50.0)
        assert key(0) in fill(policy, range(1, 1000))

    def test_priorities_never_fall_without_new_keys(self) -> None:
        policy = CostAware(100 * NBYTES)
        for i in range(50):
            policy.insert(key(i), NBYTES + i, 1.0 + i * 7 % 13)
        priorities = {one: policy._entries[one].priority for one in policy.keys()}  # noqa: SIM118
        victims = [policy.evict(anything) for _ in range(50)]
        order = [priorities[one] for one in victims if one is not None]
        assert len(order) == 50
        assert all(a <= b for a, b in pairwise(order))

    def test_removed_keys_leave_little_behind(self) -> None:
        policy = CostAware(100 * NBYTES)
        policy.insert(key(0), NBYTES)
        for i in range(1, 5000):
            policy.insert(key(i), NBYTES, 1e6)
            policy.remove(key(i))
        assert len(list(policy._items())) <= 4
        policy.check_integrity()

    def test_evictions_do_not_leave_removed_keys_behind(self) -> None:
        policy = CostAware(100 * NBYTES)
        for i in range(100):
            policy.insert(key(i), NBYTES, 1.0 + i // 50)
        for i in range(50, 90):
            policy.remove(key(i))
        for _ in range(55):
            policy.evict(anything)
            policy.check_integrity()

    def test_one_eviction_is_bounded_and_keeps_order(self) -> None:
        policy = CostAware(100 * NBYTES)
        num_keys = 3 * LOOKS_PER_POP
        for i in range(num_keys):
            policy.insert(key(i), NBYTES)
        for i in range(num_keys):
            policy.touch(key(i))
        assert policy.evict(anything) == key(0)
        stale = sum(entry.order != order for _, order, entry in policy._items())
        assert stale == num_keys - LOOKS_PER_POP
        assert [policy.evict(anything) for _ in range(1, num_keys)] == [
            key(i) for i in range(1, num_keys)
        ]
