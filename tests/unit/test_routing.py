"""Routing advice: candidates, the choice between them, what is remembered, and the loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import UsageError
from kvstrata.routing import (
    POLICIES,
    CacheAware,
    Choice,
    LeastLoad,
    Loads,
    Prompt,
    Reason,
    RoundRobin,
    Running,
    candidates,
    route,
)
from kvstrata.routing.dual import AFFINITY
from kvstrata.routing.loads import DECODING_TOKENS, USUAL_TOKENS
from kvstrata.routing.memory import AT_LEAST, PERIOD, Popularity, Sent

NODES = [f"node-{number}" for number in range(8)]
SIZE = 10


def key(number: int) -> bytes:
    return number.to_bytes(8, "little")


def prompt(*numbers: int, size: int = SIZE) -> Prompt:
    """One whose chunks are these."""
    return Prompt(tuple(map(key, numbers)), size, size * len(numbers))


def long(*numbers: int) -> Prompt:
    """The same, of chunks that are worth more than what an answer costs."""
    return prompt(*numbers, size=1000)


def send(policy: CacheAware, asked: Prompt, loads: Mapping[str, float] | None = None) -> Choice:
    choice = policy.route(asked, NODES, loads or {})
    policy.sent(asked, choice)
    return choice


# Candidates.


def test_everybody_finds_the_same_two() -> None:
    """Written down, since routers of different releases stand side by side."""
    assert candidates(b"prefix", NODES) == ("node-5", "node-0")
    assert candidates(b"prefix", NODES[::-1]) == ("node-5", "node-0")
    assert candidates(b"prefix", NODES[:1]) == ("node-0",)


def test_candidates_are_spread_evenly() -> None:
    pairs = [candidates(key(number), NODES) for number in range(4000)]
    for place in (0, 1):
        counts = Counter(pair[place] for pair in pairs)
        assert min(counts.values()) > 400
        assert max(counts.values()) < 600
    assert all(first != second for first, second in pairs)
    assert len(set(pairs)) == 8 * 7, "the second does not follow from the first"


def test_a_node_that_leaves_moves_only_what_it_had() -> None:
    left = NODES[:-1]
    for number in range(500):
        before, after = candidates(key(number), NODES), candidates(key(number), left)
        if NODES[-1] not in before:
            assert after == before
        else:
            assert set(before) - {NODES[-1]} <= set(after)


# The choice.


def pair_of(asked: Prompt, depth: int = 1) -> tuple[str, str]:
    first, second = candidates(asked.keys[depth - 1], NODES)
    return first, second


def test_without_hits_and_loads_it_is_the_first_candidate() -> None:
    asked = prompt(1, 2, 3)
    first, second = pair_of(asked)
    assert route(asked, NODES, {}) == Choice(first, Reason.LOAD, 0, (first, second))
    assert route(asked, NODES, {first: 1.0}).node == second
    assert route(asked, NODES, {first: 1.0, second: 1.0}).node == first


def test_a_hit_counts_until_the_queue_is_longer_than_it_is_worth() -> None:
    asked = prompt(1, 2, 3)
    first, second = pair_of(asked)
    worth = AFFINITY * 20
    found = route(asked, NODES, {second: worth - 1}, {second: 20})
    assert found == Choice(second, Reason.HIT, 20, (first, second))
    assert route(asked, NODES, {second: worth + 1}, {second: 20}).node == first
    # What both have decides nothing.
    both = route(asked, NODES, {first: 2.0, second: 1.0}, {first: 20, second: 20})
    assert (both.node, both.reason) == (second, Reason.LOAD)


def test_whoever_has_more_than_the_candidates_is_one() -> None:
    asked = prompt(1, 2, 3)
    first, second = pair_of(asked)
    other = next(node for node in NODES if node not in (first, second))
    found = route(asked, NODES, {}, {other: 20, first: 10})
    assert found == Choice(other, Reason.HIT, 20, (first, second, other))
    assert other not in route(asked, NODES, {}, {other: 20, first: 20}).candidates


def test_away_from_a_hot_spot_only_if_it_is_better_by_the_margin() -> None:
    asked = prompt(1, 2, 3)
    first, second = pair_of(asked)
    others = [node for node in NODES if node not in (first, second)]
    loads = {node: 500.0 for node in NODES} | {others[2]: 399.0}
    found = route(asked, NODES, loads, margin=100.0)
    assert found == Choice(others[2], Reason.MOVED, 0, (first, second))
    assert route(asked, NODES, loads, margin=101.0).node == first
    # A hit at the candidates is part of the balance.
    assert route(asked, NODES, loads, {second: 1}, margin=100.0).node == second


def test_the_depth_says_which_prefix_decides() -> None:
    one, two = prompt(1, 2), prompt(1, 3)
    assert route(one, NODES, {}).candidates == route(two, NODES, {}).candidates
    assert route(one, NODES, {}, depth=2).candidates == pair_of(one, 2)
    assert route(two, NODES, {}, depth=2).candidates == pair_of(two, 2)
    # Nothing tells this one from others: anybody will do.
    assert route(one, NODES, {NODES[0]: 1.0}, depth=3).candidates == tuple(NODES)
    assert route(Prompt((), SIZE, 3), NODES, {}).candidates == tuple(NODES)


def test_one_node_is_the_only_one() -> None:
    assert route(prompt(1), ["a"], {"a": 9.0}) == Choice("a", Reason.ONLY, 0, ("a",))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("nodes", [[], ["a", "a"]])
def test_no_node_or_one_twice_is_an_error(name: str, nodes: list[str]) -> None:
    with pytest.raises(UsageError, match="routing"):
        POLICIES[name]().route(prompt(1), nodes, {})


def test_a_prompt_has_as_many_chunks_as_its_tokens_fill() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        Prompt((b"a", b"b"), 10, 19)
    with pytest.raises(UsageError):
        Prompt((), 0, 5)


SITUATIONS = st.tuples(
    st.lists(st.integers(0, 50), min_size=1, max_size=4),
    st.permutations(NODES[:5]),
    st.dictionaries(st.sampled_from(NODES), st.floats(0, 1000)),
    st.dictionaries(st.sampled_from(NODES), st.integers(0, 40)),
    st.integers(1, 4),
    st.floats(0, 500),
)


@given(SITUATIONS)
def test_no_candidate_is_better_and_nobody_by_more_than_the_margin(situation: Any) -> None:
    numbers, nodes, loads, hits, depth, margin = situation
    asked = prompt(*numbers)
    found = route(asked, nodes, loads, hits, depth, margin)

    def cost(node: str) -> float:
        tokens = [number for number in range(min(hits.get(node, 0), asked.num_tokens))]
        worth = sum(1 if number < (depth - 1) * SIZE else AFFINITY for number in tokens)
        return float(loads.get(node, 0.0) - worth)

    assert all(cost(found.node) <= cost(node) for node in found.candidates)
    assert all(cost(found.node) <= cost(node) + margin for node in nodes)
    assert (found.reason is Reason.MOVED) == (found.node not in found.candidates)
    assert route(asked, sorted(nodes), loads, hits, depth, margin) == found


# What is remembered.


def test_the_next_turn_goes_where_the_last_one_went() -> None:
    policy = CacheAware()
    where = {number: send(policy, long(number, 100 + number)).node for number in range(40)}
    for number, node in where.items():
        found = policy.route(long(number, 100 + number, 200 + number), NODES, {})
        assert (found.node, found.hit_tokens, found.reason) == (node, 2000, Reason.HIT)


def test_what_was_moved_away_stays_away() -> None:
    policy = CacheAware()
    asked = long(1, 2)
    first, second = pair_of(asked)
    moved = send(policy, asked, {first: 1e6, second: 1e6})
    assert moved.reason is Reason.MOVED
    again = policy.route(asked, NODES, {})
    assert (again.node, again.reason) == (moved.node, Reason.HIT)


def test_what_the_fleet_knows_counts_more_than_memory() -> None:
    policy = CacheAware()
    asked = long(1, 2)
    node = send(policy, asked).node
    other = next(name for name in pair_of(asked) if name != node)
    assert policy.route(asked, NODES, {}, {node: 0, other: 1000}).node == other
    assert policy.route(asked, NODES, {}, {other: 1000}).node == node


def test_asking_changes_nothing() -> None:
    policy = CacheAware()
    for number in range(20):
        send(policy, long(number))
    asked = long(3, 4)
    assert len({policy.route(asked, NODES, {}) for _ in range(10)}) == 1


def test_work_is_spread_where_nobody_has_a_queue() -> None:
    policy = CacheAware()
    work: Counter[str] = Counter()
    for number in range(400):
        asked = long(*range(1000 * number, 1000 * number + 200))
        choice = send(policy, asked)
        work[choice.node] += asked.num_tokens
    assert max(work.values()) < 1.15 * sum(work.values()) / len(NODES)


def test_what_all_begin_with_does_not_bind_them_together() -> None:
    policy = CacheAware()
    common = list(range(30))
    counts: Counter[str] = Counter()
    for number in range(600):
        choice = send(policy, long(*common, *range(1000 * number + 50, 1000 * number + 80)))
        counts[choice.node] += number >= 100
    assert len(counts) == len(NODES), "each node computes it once"
    assert max(counts.values()) < 2 * 500 / len(NODES)


HISTORIES = st.lists(
    st.tuples(st.sampled_from(NODES[:3]), st.integers(0, 3), st.integers(1, 6)), max_size=60
)


@given(HISTORIES, st.integers(1, 12))
def test_of_each_node_what_was_sent_last_is_remembered(history: Any, room: int) -> None:
    sent = Sent(room * SIZE)
    model: dict[str, list[bytes]] = {}
    for node, family, length in history:
        asked = prompt(*range(100 * family, 100 * family + length))
        sent.add(asked, node)
        had = [k for k in model.get(node, []) if k not in asked.keys]
        model[node] = [*had, *reversed(asked.keys)][-room:]
        for probe in (prompt(*range(100 * f, 100 * f + 6)) for f in range(4)):
            expected = {}
            for name, keys in model.items():
                leading = next((i for i, k in enumerate(probe.keys) if k not in keys), 6)
                if leading:
                    expected[name] = leading * SIZE
            assert sent.leading(probe, NODES) == expected
    assert len(sent) == sum(map(len, model.values()))


def test_nodes_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.routing.memory.MAX_NODES", 3)
    sent = Sent(1000)
    for node in "abcad":
        sent.add(prompt(1), node)
    assert sent.leading(prompt(1), "abcde") == {"a": SIZE, "c": SIZE, "d": SIZE}


def test_all_nodes_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.routing.memory.MAX_CHUNKS", 5)
    sent = Sent(1000 * SIZE)
    for first, node in enumerate("aba"):
        sent.add(prompt(10 * first, 10 * first + 1), node)
    sent.add(prompt(90), "c")
    assert sent.leading(prompt(90), "abc") == {"c": SIZE}
    assert len(sent) == 5, "the one that was sent nothing for longest is forgotten"
    assert sent.leading(prompt(20), "abc") == {"a": SIZE}
    assert sent.leading(prompt(10), "abc") == {}
    sent.add(prompt(*range(100, 109)), "a")
    assert len(sent) == 13, "the last one is bounded by its own cache"


def test_common_is_what_one_in_sixteen_begins_with() -> None:
    popularity = Popularity()
    assert popularity.depth([]) == 1
    for number in range(320):
        shared = key(1) if number % 15 == 0 else key(2) if number % 17 == 0 else key(100 + number)
        popularity.add([key(0), shared, key(1000 + number)])
    assert popularity.depth([key(0), key(1), key(5)]) == 3
    assert popularity.depth([key(0), key(2), key(5)]) == 2
    assert popularity.depth([key(0), key(1)]) == 3, "all of it is common"
    assert popularity.depth([key(9)]) == 1


def test_a_few_prompts_are_not_common_yet() -> None:
    popularity = Popularity()
    for _ in range(AT_LEAST // 16):
        popularity.add([key(0)])
    assert popularity.depth([key(0)]) == 1
    popularity.add([key(0)])
    assert popularity.depth([key(0)]) == 2


def test_what_stays_common_is_so_for_ever() -> None:
    popularity = Popularity()
    for number in range(6 * PERIOD):
        popularity.add([key(0) if number % 10 == 0 else key(10 + number)])
    assert popularity.depth([key(0)]) == 2


def test_what_was_common_is_forgotten_and_memory_is_bounded() -> None:
    popularity = Popularity()
    for _ in range(PERIOD):
        popularity.add([key(0)])
    for number in range(6 * PERIOD):
        popularity.add([key(10 + number), key(1)])
    assert popularity.depth([key(0)]) == 1
    assert len(popularity) <= 2 * PERIOD


# The others.


def test_round_robin_takes_turns() -> None:
    policy = RoundRobin()
    assert [policy.route(prompt(1), "abc", {}).node for _ in range(4)] == ["a", "b", "c", "a"]


def test_least_load_asks_the_least_busy_and_else_the_one_not_asked_for_longest() -> None:
    policy = LeastLoad()
    assert policy.route(prompt(1), "abc", {"a": 2.0, "b": 1.0, "c": 3.0}).node == "b"
    order = []
    for _ in range(6):
        choice = policy.route(prompt(1), "abc", {"c": 0.0})
        policy.sent(prompt(1), choice)
        order.append(choice.node)
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_a_choice_says_why() -> None:
    assert (
        str(Choice("a", Reason.HIT, 512, ("a", "b")))
        == "a: it has 512 tokens of the prompt, of a, b"
    )
    for reason in Reason:
        assert str(Choice("a", reason)).startswith("a: ")


# Loads.


@given(st.lists(st.tuples(st.sampled_from("beal"), st.integers(0, 9), st.integers(0, 50))))
def test_loads_are_what_runs(history: list[tuple[str, int, int]]) -> None:
    loads = Loads()
    begun: list[tuple[Running, str]] = []
    waiting: dict[int, float] = {}
    ended: set[int] = set()
    told: dict[str, int] = {}
    for verb, number, tokens in history:
        node = NODES[number % 3]
        if verb == "b":
            waiting[len(begun)] = float(tokens)
            begun.append((loads.begin(node, tokens), node))
        elif verb == "l":
            alive = sum(n == node and i not in ended for i, (_, n) in enumerate(begun))
            loads.tell(node, tokens)
            told[node] = max(tokens - alive, 0)
        elif begun:
            which = number % len(begun)
            waiting[which] = 0.0
            (loads.answers if verb == "a" else loads.end)(begun[which][0])
            if verb == "e":
                ended.add(which)
        for node in NODES[:3]:
            mine = [i for i, (_, n) in enumerate(begun) if n == node and i not in ended]
            expected = sum(waiting[i] + DECODING_TOKENS for i in mine)
            assert loads.of(node) == expected + USUAL_TOKENS * told.get(node, 0)
            assert loads.all().get(node, 0.0) == loads.of(node)


def test_a_node_that_tells_nothing_any_more_has_only_what_was_sent_there() -> None:
    loads = Loads()
    loads.tell("a", 3)
    loads.tell("a", None)
    assert loads.of("a") == 0.0
