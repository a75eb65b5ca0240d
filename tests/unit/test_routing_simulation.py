"""The benchmark that routing is judged by: its trace, its nodes, and what comes out of them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from benchmarks.routing.affinity import LongestPrefix, PureAffinity
from benchmarks.routing.fleet import Machine, Node, Outcome, simulate
from benchmarks.routing.run import check, worst_load
from benchmarks.routing.trace import BLOCK_TOKENS, Request, lengthen, published, read, shorten
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.routing import CacheAware, LeastLoad, RoundRobin

NODES = [f"node-{number}" for number in range(8)]


def test_the_trace_is_read_as_others_read_it() -> None:
    requests = read()
    assert len(requests) == 12_031
    assert all(a.at_s <= b.at_s for a, b in pairwise(requests))
    assert sum(request.input_tokens for request in requests) == 144_793_823
    check(requests, [1 << 20])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 5)), max_size=20))
def test_the_short_form_loses_nothing(drawn: list[tuple[int, int, int]]) -> None:
    requests, num_blocks = [], 0
    for number, (later, known, new) in enumerate(drawn):
        old = [block for block in range(known) if block < num_blocks and block % 7 != later]
        blocks = (*old, *range(num_blocks, num_blocks + new))
        num_blocks += new
        requests.append(Request(3.0 * number + later, 100 + known, new, blocks))
    assert lengthen(shorten(requests)) == requests


def test_blocks_that_are_not_numbered_on_have_no_short_form() -> None:
    with pytest.raises(ValueError, match="do not follow on 0"):
        shorten([Request(0.0, 600, 1, (1, 2))])


def test_the_published_form() -> None:
    line = '{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}\n'
    assert published(line * 2) == [Request(3.0, 600, 7, (4, 9))] * 2


def test_a_node_computes_one_prompt_after_the_other() -> None:
    machine = Machine(10_000, prefill=100.0, load=1000.0, step_s=0.5, decode_s=0.1)
    node = Node(machine)
    keys = [b"a", b"b"]
    first = node.serve(Request(1.0, 1024, 10, (0, 1)), keys)
    assert first.hit_tokens == 0
    assert first.first_at == pytest.approx(11.24)
    assert first.end_at == pytest.approx(16.24)
    assert first.work_s == pytest.approx(11.24)
    # It waits until the first one's work is done, and loads what is there.
    second = node.serve(Request(2.0, 1024, 0, (0, 1)), keys)
    assert second.hit_tokens == 1024
    assert second.first_at == pytest.approx(12.24 + 1.024)


def test_a_cache_keeps_what_was_used_last_head_before_tail() -> None:
    node = Node(Machine(3 * BLOCK_TOKENS))
    for keys in ([b"a", b"b"], [b"c", b"d"]):
        node.serve(Request(0.0, 1024, 0, (0, 1)), keys)
    assert node.leading([b"a", b"b"]) == 1
    assert node.leading([b"c", b"d"]) == 2


def test_load_is_the_work_that_was_sent_in_whole_windows() -> None:
    work = {(0, 0): 3.0, (0, 1): 1.0, (1, 1): 5.0, (2, 0): 9.0}
    outcome = Outcome(work_s=work, num_nodes=2, length_s=150.0)
    assert outcome.imbalance() == [1.5, 2.0]


def chats(seed: int) -> list[Request]:
    """Conversations behind one system prompt, some of them long and with many turns."""
    draw = random.Random(seed)
    going: list[tuple[int, ...]] = []
    requests, num_blocks = [], 8
    for number in range(1500):
        if going and draw.random() < 0.6:
            before = going.pop(draw.randrange(max(len(going) - 60, 0), len(going)))
        else:
            before = tuple(range(8))
        new = min(int(draw.paretovariate(1.2) * 4), 60)
        blocks = (*before, *range(num_blocks, num_blocks + new))
        num_blocks += new
        if len(blocks) < 200:
            going.append(blocks)
        requests.append(Request(0.35 * number, BLOCK_TOKENS * len(blocks), 200, blocks))
    return requests


def test_it_follows_caches_as_well_as_affinity_and_load_as_well_as_the_least() -> None:
    """On other conversations than those that its constants were found on."""
    requests, machine = chats(1), Machine(400_000)
    ways = {
        "affinity": simulate(requests, NODES, machine, PureAffinity),
        "longest": simulate(requests, NODES, machine, LongestPrefix, knows=True),
        "least": simulate(requests, NODES, machine, LeastLoad),
        "turns": simulate(requests, NODES, machine, RoundRobin),
        "known": simulate(requests, NODES, machine, CacheAware, knows=True),
        "memory": simulate(requests, NODES, machine, lambda: CacheAware(400_000)),
    }
    rates = {name: outcome.hit_rate for name, outcome in ways.items()}
    loads = {name: worst_load(outcome) for name, outcome in ways.items()}
    print(rates, loads)
    for name in ("known", "memory"):
        assert rates[name] > 0.95 * rates["affinity"]
        assert rates[name] > 1.5 * max(rates["least"], rates["turns"])
        assert loads[name] < 1.1 * loads["least"]
        assert loads[name] < 0.8 * loads["affinity"]
