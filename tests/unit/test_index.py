"""The index of a tier: what is there, what it weighs, what is about to go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.node.common import index as index_module
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.policies import POLICIES, create_policy
from kvstrata.policies.lru import LRU
from kvstrata.tiers.marks import Whose

KEYS = [bytes([number]) * 32 for number in range(6)]
CAPACITY = 20


def make(policy: str = "lru") -> Index[int]:
    return Index(CAPACITY, create_policy(policy, CAPACITY), lambda entry: entry)


def put(index: Index[int], key: bytes, part: int, nbytes: int) -> int | None:
    assert index.claim(nbytes)
    return index.put(key, part, nbytes)


def test_objects_of_a_chunk_stand_together() -> None:
    index = make()
    put(index, KEYS[0], 0, 3)
    put(index, KEYS[0], 1, 4)
    put(index, KEYS[1], 0, 5)
    assert (index.get(KEYS[0], 1), index.get(KEYS[0], 2), index.get(KEYS[2], 0)) == (4, None, None)
    assert (len(index), index.num_objects, index.used_bytes) == (2, 3, 12)
    assert index.pop(KEYS[0], 0, Cause.EVICTED) == 3
    assert index.pop(KEYS[0], 0, Cause.EVICTED) is None
    assert KEYS[0] in index
    assert index.pop_chunk(KEYS[0], Cause.EVICTED) == [(1, 4)]
    assert index.pop_chunk(KEYS[0], Cause.EVICTED) == []
    assert (len(index), index.num_objects, index.used_bytes) == (1, 1, 5)
    index.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quota", [None, 3])
def test_what_a_scan_found_is_entered_as_one_by_one(policy: str, quota: int | None) -> None:
    dice = random.Random(1)
    at_once, one_by_one = make(policy), make(policy)
    for index in (at_once, one_by_one):
        index.set_quota(b"", quota)
        put(index, KEYS[0], 0, 1)
        index.learn(KEYS[0], Whose(b"me", bytes(32)))
    while one_by_one.used_bytes < CAPACITY - 4:
        found = [((dice.choice(KEYS), dice.randrange(4)), 1) for _ in range(3)]
        for (key, part), nbytes in found:
            if one_by_one.get(key, part) is None:
                put(one_by_one, key, part, nbytes)
        assert at_once.adopt(found)
        at_once.check_integrity()
        assert set(at_once.parts()) == set(one_by_one.parts())
        assert all(dict(at_once.objects(key)) == dict(one_by_one.objects(key)) for key in KEYS)
        assert at_once.num_objects == one_by_one.num_objects
        assert at_once.owners.shown() == one_by_one.owners.shown()
    before = dict(at_once.parts().items())
    assert at_once.adopt(found)
    assert not at_once.adopt([((bytes([9]) * 32, 0), CAPACITY)])
    assert dict(at_once.parts().items()) == before
    if policy == "lru":
        victims = [[index.victim(lambda _: True) for _ in KEYS] for index in (at_once, one_by_one)]
        assert victims[0] == victims[1]


def test_the_bound_is_hard() -> None:
    index = make()
    assert index.claim(CAPACITY)
    assert not index.claim(1)
    index.unclaim(1)
    assert index.claim(1)
    index.put(KEYS[0], 0, CAPACITY)
    assert not index.claim(1)
    index.check_integrity()
    with pytest.raises(AssertionError):
        index.unclaim(1)
    with pytest.raises(AssertionError):
        index.put(KEYS[1], 0, 1)  # nothing was claimed for it


def test_a_replaced_object_is_counted_once() -> None:
    index = make()
    put(index, KEYS[0], 0, 3)
    assert put(index, KEYS[0], 0, 7) == 3
    assert (index.num_objects, index.used_bytes) == (1, 7)
    index.check_integrity()


def test_the_policy_weighs_whole_chunks() -> None:
    policy = create_policy("lru", CAPACITY)
    index: Index[int] = Index(CAPACITY, policy, lambda entry: entry)
    put(index, KEYS[0], 0, 3)
    put(index, KEYS[0], 1, 4)
    assert policy.total_bytes == 7


def test_a_touched_prefix_loses_its_tail_first() -> None:
    index = make()
    for key in KEYS[:4]:
        put(index, key, 0, 1)
    index.touch([KEYS[0], KEYS[1], KEYS[5], KEYS[2]])
    victims = []
    while (victim := index.victim(lambda _: True)) is not None:
        victims.append(victim)
        index.pop_chunk(victim, Cause.EVICTED)
    assert victims == [KEYS[3], KEYS[2], KEYS[1], KEYS[0]]
    index.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "cost"])
def test_what_is_cleared_stays_claimed(policy: str) -> None:
    index = make(policy)
    put(index, KEYS[0], 0, 3)
    put(index, KEYS[1], 1, 4)
    assert index.claim(2)
    assert {key: flat[1:] for key, flat in index.clear()} == {
        KEYS[0]: (0, 3),
        KEYS[1]: (1, 4),
    }
    assert (len(index), index.num_objects, index.used_bytes, index.claimed_bytes) == (0, 0, 9, 9)
    assert not index.claim(12)
    index.check_integrity()
    index.unclaim(7)
    index.put(KEYS[2], 0, 2)
    index.check_integrity()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "pop", "pop_chunk", "victim", "clear"]),
            st.sampled_from(KEYS),
            st.integers(0, 2),
            st.integers(1, 6),
        ),
        max_size=60,
    ),
    st.sampled_from(["lru", "s3fifo", "cost"]),
)
def test_against_a_dictionary(steps: list[tuple[str, bytes, int, int]], policy: str) -> None:
    index, model = make(policy), dict[tuple[bytes, int], int]()
    for verb, key, part, nbytes in steps:
        if verb == "put" and index.claim(nbytes):
            assert index.put(key, part, nbytes) == model.get((key, part))
            model[key, part] = nbytes
        elif verb == "pop":
            assert index.pop(key, part, Cause.EVICTED) == model.pop((key, part), None)
        elif verb == "pop_chunk":
            assert dict(index.pop_chunk(key, Cause.EVICTED)) == {
                q: model.pop((k, q)) for k, q in list(model) if k == key
            }
        elif verb == "victim":
            victim = index.victim(lambda _: True)
            assert (victim is None) == (not model)
            if victim is not None:
                index.pop_chunk(victim, Cause.EVICTED)
                model = {name: size for name, size in model.items() if name[0] != victim}
        elif verb == "clear":
            index.clear()
            index.unclaim(index.claimed_bytes)
            model.clear()
        assert index.used_bytes == sum(model.values()) <= CAPACITY
        assert {(k, q): e for k in index.keys() for q, e in index.objects(k)} == model  # noqa: SIM118
        index.check_integrity()


ANNA, BERT = Whose(b"a" * 16, b"n" * 32), Whose(b"b" * 16, b"n" * 32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_a_quota_orders_all_that_its_owner_has_while_others_go_on(
    policy: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "SLICE", 4)
    draw = random.Random(seed)
    index: Index[int] = Index(1000, create_policy(policy, 1000), lambda entry: entry)
    keys = [number.to_bytes(32, "big") for number in range(200)]
    whose = {key: draw.choice([ANNA, BERT]) for key in keys}

    def act() -> None:
        key, action = draw.choice(keys), draw.randrange(4)
        if action <= 1 and index.claim(1):
            index.put(key, 0, 1, whose=whose[key])
        elif action == 2:
            first = draw.randrange(190)
            index.touch([one for one in keys[first : first + 10] if whose[one] == whose[key]])
        elif action == 3:
            index.pop_chunk(key, Cause.EVICTED)

    def of_anna() -> list[bytes]:
        return [one for one in list(index._policy.keys()) if whose[one] == ANNA]

    for key in keys:
        assert index.claim(1)
        index.put(key, 0, 1, whose=whose[key])
    for _ in range(100):
        act()
    account = index.set_quota(ANNA.owner, 1000)
    assert account.policy is not None
    known = steps = 0
    for _ in index.order_for_quota(account):
        steps += 1
        assert len(account.policy) <= known + 4, "more than a slice at once"
        for _ in range(draw.randrange(3)):
            act()
        known = len(account.policy)
    assert steps > 20
    assert set(account.policy.keys()) == set(of_anna())
    assert len(account.policy) == account.num_chunks
    if policy == "lru":
        assert list(account.policy.keys()) == of_anna(), "in the order of all chunks"
    assert account.meanwhile is None
    assert list(index.order_for_quota(account)) == [], "there is nothing left to do"
    index.check_integrity()


def test_lru_is_walked_step_by_step() -> None:
    policy = LRU(CAPACITY)
    for key in KEYS:
        policy.insert(key, 1)
    walk = policy.walk()
    for number, key in enumerate(KEYS, 1):
        assert next(walk) == key
        assert len(policy._passed) == number
    assert [one for one in walk if one is not None] == []
    assert list(policy.keys()) == KEYS
    assert len(policy._passed) == 0
