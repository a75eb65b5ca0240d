"""The contract every eviction policy keeps, as a class of tests to subclass.

::

    class TestMine(PolicyContract):
        def make_policy(self, capacity_bytes, clock):
            return Mine(capacity_bytes, clock)
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest

from kvstrata.errors import UsageError
from kvstrata.policies.base import PRIORITIES, Policy
from kvstrata.testing.clock import ManualClock

NBYTES = 1000


def key(number: int) -> bytes:
    """A key of 32 bytes, distinct for every number."""
    return number.to_bytes(32, "big")


def anything(_: bytes) -> bool:
    """Nothing is leased."""
    return True


class PolicyContract(ABC):
    """Subclass, implement `make_policy`, and pytest collects the tests."""

    @abstractmethod
    def make_policy(self, capacity_bytes: int, clock: Callable[[], float]) -> Policy:
        """A fresh, empty policy."""

    @pytest.fixture
    def policy(self) -> Policy:
        return self.make_policy(100 * NBYTES, ManualClock())

    def test_empty(self, policy: Policy) -> None:
        assert len(policy) == 0
        assert policy.total_bytes == 0
        assert key(1) not in policy
        assert list(policy.keys()) == []
        assert policy.evict(anything) is None
        policy.check_integrity()

    def test_insert_then_evict_all(self, policy: Policy) -> None:
        for i in range(50):
            policy.insert(key(i), NBYTES + i)
        assert len(policy) == 50
        assert policy.total_bytes == 50 * NBYTES + sum(range(50))
        assert set(policy.keys()) == {key(i) for i in range(50)}
        victims = [policy.evict(anything) for _ in range(50)]
        assert sorted(victim for victim in victims if victim) == [key(i) for i in range(50)]
        assert policy.evict(anything) is None
        assert (len(policy), policy.total_bytes) == (0, 0)
        policy.check_integrity()

    def test_victim_is_gone(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES)
        assert policy.evict(anything) == key(1)
        assert key(1) not in policy
        with pytest.raises(UsageError):
            policy.touch(key(1))

    def test_fresh_prefix_goes_tail_first(self, policy: Policy) -> None:
        tail_to_head = [key(i) for i in range(60)]
        for one in tail_to_head:
            policy.insert(one, NBYTES)
        assert [policy.evict(anything) for _ in tail_to_head] == tail_to_head

    def test_used_prefix_goes_tail_first(self, policy: Policy) -> None:
        tail_to_head = [key(i) for i in range(60)]
        for one in tail_to_head:
            policy.insert(one, NBYTES)
        for _ in range(3):
            for one in tail_to_head:
                policy.touch(one)
        assert [policy.evict(anything) for _ in tail_to_head] == tail_to_head

    def test_touch_of_many_is_a_touch_of_each_that_is_there(self, policy: Policy) -> None:
        other = type(policy)(policy.capacity_bytes, policy.clock)
        draw = random.Random(0)
        for i in range(60):
            for each in (policy, other):
                each.insert(key(i), NBYTES, 1.0)
                if i == 20:
                    assert each.evict(lambda _: False) is None
        for _ in range(20):
            some = [key(draw.randrange(80)) for _ in range(20)]
            policy.touch_all(some)
            for one in some:
                if one in other:
                    other.touch(one)
            assert list(policy.keys()) == list(other.keys())
        for i in range(60):
            policy.unpark(key(i))
            other.unpark(key(i))
        ours = [policy.evict(anything) for _ in range(60)]
        assert ours == [other.evict(anything) for _ in range(60)]
        assert None not in ours
        policy.check_integrity()

    def test_prefix_goes_tail_first_after_its_lease_ends(self, policy: Policy) -> None:
        tail_to_head = [key(i) for i in range(60)]
        for one in tail_to_head:
            policy.insert(one, NBYTES)
        policy.insert(key(99), NBYTES)
        assert policy.evict(lambda one: one == key(99)) == key(99)  # passes over the prefix
        for one in reversed(tail_to_head):
            policy.unpark(one)
        assert [policy.evict(anything) for _ in tail_to_head] == tail_to_head

    def test_insert_of_a_present_key_is_a_touch(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES)
        policy.insert(key(1), 2 * NBYTES)
        assert len(policy) == 1
        assert policy.total_bytes == 2 * NBYTES
        assert policy.evict(anything) == key(1)
        assert policy.evict(anything) is None
        policy.check_integrity()

    def test_insert_of_a_passed_over_key(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES)
        assert policy.evict(lambda _: False) is None
        policy.insert(key(1), 2 * NBYTES)
        assert (len(policy), policy.total_bytes) == (1, 2 * NBYTES)
        policy.check_integrity()

    def test_touch_of_an_unknown_key_is_a_bug(self, policy: Policy) -> None:
        with pytest.raises(UsageError, match=key(7).hex()):
            policy.touch(key(7))

    def test_remove_is_idempotent(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES)
        policy.insert(key(2), NBYTES)
        policy.remove(key(1))
        policy.remove(key(1))
        policy.remove(key(3))
        assert (len(policy), policy.total_bytes) == (1, NBYTES)
        assert policy.evict(anything) == key(2)
        assert policy.evict(anything) is None

    def test_remove_of_a_passed_over_key(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES)
        assert policy.evict(lambda _: False) is None
        assert key(1) in policy
        policy.remove(key(1))
        assert (len(policy), policy.total_bytes) == (0, 0)
        assert policy.evict(anything) is None
        policy.check_integrity()

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_size_must_be_positive(self, policy: Policy, nbytes: int) -> None:
        with pytest.raises(UsageError):
            policy.insert(key(1), nbytes)
        assert len(policy) == 0

    def test_a_cost_is_the_last_that_was_known_or_of_no_interest(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES, 2.5)
        policy.insert(key(1), NBYTES)
        policy.insert(key(2), NBYTES)
        assert policy.cost_of(key(1)) in (0.0, 2.5)
        assert policy.cost_of(key(2)) == policy.cost_of(key(3)) == 0.0

    @pytest.mark.parametrize("cost", [-1.0, math.inf, math.nan])
    def test_cost_must_be_a_time(self, policy: Policy, cost: float) -> None:
        with pytest.raises(UsageError):
            policy.insert(key(1), NBYTES, cost)
        assert len(policy) == 0

    @pytest.mark.parametrize("priority", [PRIORITIES[0] - 1, PRIORITIES[-1] + 1])
    def test_priority_must_be_one(self, policy: Policy, priority: int) -> None:
        with pytest.raises(UsageError):
            policy.insert(key(1), NBYTES, 1.0, priority)
        assert len(policy) == 0

    def test_a_priority_is_the_last_that_was_said(self, policy: Policy) -> None:
        assert policy.priority_of(key(1)) == 0
        for said, holds in [(2, 2), (0, 2), (-1, -1), (0, -1), (1, 1)]:
            policy.insert(key(1), NBYTES, 1.0, said)
            policy.touch(key(1))
            assert policy.priority_of(key(1)) == holds
            policy.check_integrity()
        policy.remove(key(1))
        assert policy.priority_of(key(1)) == 0
        for gone in (policy.remove, lambda _: policy.evict(anything)):
            policy.insert(key(1), NBYTES, 1.0, 3)
            gone(key(1))
            policy.insert(key(1), NBYTES, 1.0)
            assert policy.priority_of(key(1)) == 0

    @pytest.mark.parametrize("uses", [0, 3])
    def test_low_priority_goes_first(self, policy: Policy, uses: int) -> None:
        low, usual = [key(i) for i in range(0, 20, 2)], [key(i) for i in range(1, 20, 2)]
        for one in sorted(low + usual):
            policy.insert(one, NBYTES, 1.0, -1 if one in low else 0)
        for _ in range(uses):
            for one in sorted(low + usual):
                policy.touch(one)
        assert [policy.evict(anything) for _ in low] == low
        assert {policy.evict(anything) for _ in usual} == set(usual)

    @pytest.mark.parametrize("priority", [1, 2, 3])
    def test_high_priority_stays_longer(self, policy: Policy, priority: int) -> None:
        high, usual = {key(i) for i in range(0, 100, 2)}, [key(i) for i in range(1, 100, 2)]
        for one in sorted([*high, *usual]):
            policy.insert(one, NBYTES, 1.0, priority if one in high else 0)
            policy.touch(one)
            policy.touch(one)
        assert [policy.evict(anything) for _ in range(40)] == usual[:40]

    def test_no_priority_lasts_for_ever(self, policy: Policy) -> None:
        high = {key(i) for i in range(10)}
        for one in high:
            policy.insert(one, NBYTES, 1.0, PRIORITIES[-1])
        number, evicted = 10, 0
        while high:
            number += 1
            assert number < 100_000, "they are there for good"
            while policy.total_bytes + NBYTES > policy.capacity_bytes:
                victim = policy.evict(anything)
                high -= {victim}
                evicted += 1
            policy.insert(key(number), NBYTES, 1.0)
            for _ in range(2):
                policy.touch(key(number))
        assert evicted > 150, "though they stay longer than others, which go after 100"
        policy.check_integrity()

    @pytest.mark.parametrize("priority", PRIORITIES)
    def test_a_prefix_of_any_priority_goes_tail_first(self, policy: Policy, priority: int) -> None:
        tail_to_head = [key(i) for i in range(60)]
        for one in tail_to_head:
            policy.insert(one, NBYTES, 1.0, priority)
        for one in tail_to_head:
            policy.touch(one)
        assert [policy.evict(anything) for _ in tail_to_head] == tail_to_head

    def test_free_of_cost(self, policy: Policy) -> None:
        policy.insert(key(1), NBYTES, 0.0)
        assert policy.evict(anything) == key(1)

    def test_leased_keys_stay(self, policy: Policy) -> None:
        for i in range(10):
            policy.insert(key(i), NBYTES)
        leased = {key(i) for i in range(0, 10, 2)}
        free = [key(i) for i in range(1, 10, 2)]
        assert [policy.evict(lambda one: one not in leased) for _ in free] == free
        assert policy.evict(lambda one: one not in leased) is None
        assert set(policy.keys()) == leased
        assert policy.total_bytes == 5 * NBYTES
        policy.check_integrity()

    def test_leased_keys_keep_their_place(self, policy: Policy) -> None:
        for i in range(5):
            policy.insert(key(i), NBYTES)
        assert policy.evict(lambda one: one not in (key(0), key(1))) == key(2)
        assert policy.evict(anything) == key(3)
        policy.unpark(key(1))
        policy.unpark(key(0))
        assert [policy.evict(anything) for _ in range(3)] == [key(0), key(1), key(4)]

    def test_no_key_is_lost_when_the_question_fails(self, policy: Policy) -> None:
        for i in range(3):
            policy.insert(key(i), NBYTES)

        def broken(_: bytes) -> bool:
            raise RuntimeError("boom")

        for _ in range(5):
            with pytest.raises(RuntimeError, match="boom"):
                policy.evict(broken)
            policy.check_integrity()
        assert len(policy) == 3
        assert {policy.evict(anything) for _ in range(3)} == {key(0), key(1), key(2)}

    def test_a_leased_key_is_asked_about_once(self, policy: Policy) -> None:
        num_leased, num_free = 2000, 1000
        for i in range(num_leased + num_free):
            policy.insert(key(i), NBYTES)
        calls = 0

        def evictable(one: bytes) -> bool:
            nonlocal calls
            calls += 1
            return int.from_bytes(one, "big") >= num_leased

        for _ in range(num_free):
            assert policy.evict(evictable) is not None
        for _ in range(100):
            assert policy.evict(evictable) is None
        assert calls == num_leased + num_free
        assert len(policy) == num_leased
        policy.check_integrity()

    def test_a_released_key_is_found_though_many_are_leased(self, policy: Policy) -> None:
        for i in range(1000):
            policy.insert(key(i), NBYTES)
        assert policy.evict(lambda _: False) is None
        policy.unpark(key(500))
        policy.unpark(key(400))
        assert policy.evict(lambda one: one == key(500)) == key(500)
        assert policy.evict(anything) is None
        policy.check_integrity()

    def test_unpark_of_other_keys_is_no_news(self, policy: Policy) -> None:
        for i in range(3):
            policy.insert(key(i), NBYTES)
        policy.unpark(key(0))
        policy.unpark(key(7))
        assert policy.evict(lambda _: False) is None
        for _ in range(2):
            policy.unpark(key(1))
        assert [policy.evict(anything) for _ in range(2)] == [key(1), None]
        assert (len(policy), policy.total_bytes) == (2, 2 * NBYTES)
        policy.check_integrity()

    @pytest.mark.parametrize("seed", range(5))
    def test_random_history(self, policy: Policy, seed: int) -> None:
        draw = random.Random(seed)
        model: dict[bytes, int] = {}
        leased: set[bytes] = set()

        def is_free(one: bytes) -> bool:
            return one not in leased

        for _ in range(2000):
            one = key(draw.randrange(80))
            action = draw.randrange(6)
            if action <= 1:
                model[one] = draw.randrange(1, 3 * NBYTES)
                policy.insert(one, model[one], draw.random(), draw.choice(PRIORITIES))
            elif action == 2 and one in model:
                policy.touch(one)
            elif action == 3 and draw.random() < 0.3:
                policy.remove(one)
                model.pop(one, None)
            elif action == 4:
                leased.symmetric_difference_update({one})
                if one not in leased:
                    policy.unpark(one)
            elif action == 5:
                victim = policy.evict(is_free)
                assert (victim is None) == (not model.keys() - leased)
                if victim is not None:
                    assert victim not in leased
                    assert policy.priority_of(victim) == 0, "it is remembered no longer"
                    del model[victim]
            assert len(policy) == len(model)
            assert policy.total_bytes == sum(model.values())
        policy.check_integrity()
        assert set(policy.keys()) == model.keys()
        assert all(one in policy for one in model)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_walk_tells_all_that_stay_and_changes_nothing(
        self, policy: Policy, seed: int
    ) -> None:
        """A twin has the same history without walks: both evict the same, in the same order."""
        twin = self.make_policy(100 * NBYTES, ManualClock())
        draw, leased = random.Random(seed), set[bytes]()

        def is_free(one: bytes) -> bool:
            return one not in leased

        def act() -> bytes | None:
            """Something that happens to both; the key that it was about."""
            one, action = key(draw.randrange(80)), draw.randrange(6)
            if action <= 1:
                nbytes, cost = draw.randrange(1, 3 * NBYTES), draw.random()
                priority = draw.choice(PRIORITIES)
                for each in (policy, twin):
                    each.insert(one, nbytes, cost, priority)
            elif action == 2 and one in policy:
                for each in (policy, twin):
                    each.touch(one)
            elif action == 3:
                for each in (policy, twin):
                    each.remove(one)
            elif action == 4:
                leased.symmetric_difference_update({one})
                if one not in leased:
                    for each in (policy, twin):
                        each.unpark(one)
                return None
            elif action == 5:
                victim = policy.evict(is_free)
                assert victim == twin.evict(is_free)
                return victim
            return one

        for _ in range(300):
            act()
        for number in range(20):
            stay, told = set(policy.keys()), set[bytes | None]()
            walk = policy.walk()
            for one in walk:
                told.add(one)
                for _ in range(draw.randrange(3)):
                    stay.discard(act() or b"")
                if number % 4 == 3 and draw.random() < 0.1:
                    break  # it is left in the middle
            else:
                assert stay <= told
                assert told <= {None, *map(key, range(80))}
            policy.check_integrity()
            assert len(policy) == len(twin)
        for one in leased:
            policy.unpark(one)
            twin.unpark(one)
        while (victim := twin.evict(anything)) is not None:
            assert policy.evict(anything) == victim
        assert policy.evict(anything) is None
