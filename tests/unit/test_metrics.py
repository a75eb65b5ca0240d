"""Metrics: declared once, counted right, and read by Prometheus' own parser as what they are."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.support.nodes import (
    SLOT,
    chunk_keys,
    clear,
    flush,
    load,
    match,
    on_node,
    owned,
    release,
    store,
)

from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.observe.catalogue import ENGINE, GROUPS, NODE, NODE_PREFIX, Kind, by_name
from kvstrata.observe.counters import Counters
from kvstrata.observe.records import MOST
from kvstrata.observe.rendering import render
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

ROOT = Path(__file__).parents[2]
ME = Client("pid 1")


def scraped(text: bytes) -> dict[str, float]:
    """Every sample as Prometheus' parser reads it."""
    return {
        sample.name.removeprefix(NODE_PREFIX)
        + "".join(f" {label}={value}" for label, value in sorted(sample.labels.items())): (
            sample.value
        )
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def of(node: Node) -> dict[str, float]:
    return scraped(render(node.measures.answer(ME, p.Metrics(1))))


# the catalogue


def test_names_tell_their_unit_and_kind() -> None:
    units = ("_bytes", "_seconds", "_ratio", "_info", "_ok", "_state", "_calls", "_chunks")
    counts = ("leases", "reservations", "pins", "quotas", "owners", "marks")
    for metric in [*NODE.values(), *ENGINE]:
        name = metric.name
        assert name.endswith("_total") == (metric.kind is Kind.COUNTER), name
        if metric.kind is Kind.GAUGE:
            assert name.endswith(units) or name in counts, name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), name
        assert list(metric.buckets) == sorted(set(metric.buckets)), name
        assert metric.about.endswith("."), name
        assert not set(metric.labels) & {"le", "job", "instance", "key", "request_id"}, name
    by_name(ENGINE)


def counted_in_the_source() -> Iterator[tuple[str, str, str, frozenset[str]]]:
    """Every call of ``add`` and ``observe`` on counters: where, verb, name, labels."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("add", "observe")
                and "counters" in ast.unparse(node.func.value)
                and node.args
            ):
                labels = frozenset(word.arg or "**" for word in node.keywords)
                name = node.args[0]
                where = f"{file.name}:{node.lineno}"
                assert isinstance(name, ast.Constant), f"{where}: the name is no constant"
                yield where, node.func.attr, str(name.value), labels


def test_all_that_the_code_counts_is_declared_and_the_other_way_round() -> None:
    kinds = {"add": Kind.COUNTER, "observe": Kind.HISTOGRAM}
    found = set()
    for where, verb, name, labels in counted_in_the_source():
        assert name in NODE, f"{where}: {name} is not declared"
        assert NODE[name].kind is kinds[verb], where
        assert labels == set(NODE[name].labels), f"{where}: {name} has {NODE[name].labels}"
        found.add(name)
    assert len(found) > 30, "the search is broken"
    gauges = {name for name, metric in NODE.items() if metric.kind is Kind.GAUGE}
    assert found == NODE.keys() - gauges, "declared, and counted nowhere"


@pytest.mark.parametrize(
    "count",
    [
        lambda c: c.add("hits_totale"),
        lambda c: c.add("matches_total", tier="disk"),
        lambda c: c.add("hit_chunks_total"),
        lambda c: c.add("match_seconds"),
        lambda c: c.observe("matches_total", 1.0),
    ],
)
def test_what_is_not_declared_cannot_be_counted(count: Any) -> None:
    with pytest.raises(AssertionError):
        count(Counters())


def test_the_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == script("generate_metrics").page(), "stale: run scripts/generate_metrics.py"
    assert all(f"`{NODE_PREFIX}{name}`" in page for name in NODE)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# counting


@given(st.lists(st.tuples(st.sampled_from(["host", "disk"]), st.integers(0, 10)), max_size=30))
def test_counters_are_sums(added: list[tuple[str, int]]) -> None:
    counters, sums = Counters(), Counter[str]()
    for tier, value in added:
        counters.add("hit_chunks_total", value, tier=tier)
        counters.add("tier_writes_total", value, tier=tier, outcome="hit")
        counters.add("tier_writes_total", value, outcome="hit", tier=tier)
        sums[tier] += value
    for tier, value in sums.items():
        assert counters.get("hit_chunks_total", tier=tier) == value
        assert counters.get("tier_writes_total", outcome="hit", tier=tier) == 2 * value
    assert len(counters.snapshot()) == 2 * len(sums), "the order of labels makes no second series"


@given(st.lists(st.floats(0, 20), max_size=50))
def test_a_histogram_is_one_to_prometheus(values: list[float]) -> None:
    counters = Counters()
    values += NODE["match_seconds"].buckets  # a bound counts as below itself
    for value in values:
        counters.observe("match_seconds", value)
    distributions = [
        o.Distribution(one.name, one.labels, list(one.bounds), one.counts, one.sum)
        for one in counters.distributions()
    ]
    found = scraped(render(p.Measured(1, [], distributions)))
    for bound in NODE["match_seconds"].buckets:
        below = sum(value <= bound for value in values)
        assert found[f"match_seconds_bucket le={bound:g}"] == below
    assert found["match_seconds_bucket le=+Inf"] == found["match_seconds_count"] == len(values)
    assert math.isclose(found["match_seconds_sum"], sum(values))


def test_what_another_release_counts_is_left_out() -> None:
    values = [o.Value("of_tomorrow_total", {}, 1.0), o.Value("leases", {}, 2.0)]
    assert scraped(render(p.Measured(1, values, []))) == {"leases": 2.0}


def test_a_label_may_hold_anything() -> None:
    values = [o.Value("bugs_total", {"where": 'a "tier"\n\\ of mine'}, 1.0)]
    text = render(p.Measured(1, values, []))
    assert scraped(text) == {'bugs_total where=a "tier"\n\\ of mine': 1.0}


# a node's


def test_a_node_counts_what_goes_through_it() -> None:
    async def test(node: Node) -> None:
        keys = chunk_keys(4)
        store(node, ME, keys)
        await flush(node, ME)
        matched = match(node, ME, keys)
        held = of(node)
        assert held["leases"] == 1
        assert held["leased_bytes"] == held["host_used_bytes"] == 4 * SLOT
        release(node, ME, matched.lease)
        await clear(node, ME, keys, ["host"])
        assert await load(node, ME, [*keys, *chunk_keys(2, prompt=1)]) == 4
        await flush(node, ME)
        found = of(node)
        assert found["leases"] == 0
        assert found["hit_chunks_total tier=host"] == found["hit_chunks_total tier=memory"] == 4
        assert found["missed_chunks_total"] == 2
        assert found["matches_total"] == found["match_seconds_count"] == 2
        assert found["entered_objects_total tier=host"] == 8
        assert found["entered_objects_total tier=memory"] == 4
        assert found["left_objects_total cause=cleared tier=host"] == 4
        assert found["tier_write_bytes_total tier=memory"] == 4 * SLOT
        assert found["tier_read_bytes_total tier=memory"] == 4 * SLOT
        assert found["tier_call_seconds_count call=write tier=memory"] == 2  # of two each
        assert found["tier_call_seconds_count call=read tier=memory"] == 4
        assert found["restored_bytes_total tier=memory"] == 4 * 5000
        assert found["tier_used_bytes tier=memory"] == 4 * SLOT
        assert found["tier_chunks tier=memory"] == found["host_chunks"] == 4
        assert found["plans_total decision=load"] == 1
        states = {name: value for name, value in found.items() if name.startswith("tier_state")}
        assert states.pop("tier_state state=ok tier=memory") == 1
        assert set(states.values()) == {0}
        owned(node).trip(OSError("the disk is gone"))
        assert of(node)["tier_state state=off tier=memory"] == 1
        assert of(node)["tier_trips_total tier=memory"] == 1

    on_node(test, tier=MemoryTier(), slots=20)


def test_evictions_are_counted_by_tier() -> None:
    async def test(node: Node) -> None:
        for prompt in range(6):
            store(node, ME, chunk_keys(2, prompt))
            await flush(node, ME)
        found = of(node)
        assert found["left_objects_total cause=evicted tier=host"] == 12 - 4
        assert found["left_objects_total cause=evicted tier=memory"] == 12 - 8
        await clear(node, ME)
        found = of(node)
        assert found["tier_clears_total tier=host"] == found["tier_clears_total tier=memory"] == 1

    on_node(test, tier=MemoryTier(), slots=4, tier_slots=8)


def test_a_record_is_counted_in_tokens_and_seconds() -> None:
    async def test(node: Node) -> None:
        record = {
            "request": "1", "outcome": "stopped", "prompt_tokens": 1000, "local_tokens": 100,
            "tier_tokens": {"host": 256, "memory": 512, "elsewhere": 9}, "load": "async",
            "load_s": 0.2, "load_s_expected": 0.1, "load_instead_s": 1.5,
            "reasons": [{"why": "evicted", "tokens": 100}, {"why": "evicted", "tokens": 32}],
        }  # fmt: skip
        node.record(ME, p.Record(record))
        node.record(ME, p.Record({**record, "load_instead_s": 0.1, "tier_tokens": {"host": 1}}))
        found = of(node)
        assert found["asked_tokens_total"] == 2000
        assert found["engine_tokens_total"] == 200
        assert found["hit_tokens_total tier=host"] == 257
        assert found["hit_tokens_total tier=memory"] == 512
        assert "hit_tokens_total tier=elsewhere" not in found
        assert found["computed_tokens_total why=evicted"] == 264
        assert sum("computed_tokens" in name for name in found) == 1
        assert math.isclose(found["ttft_saved_seconds_total"], 1.3)
        assert math.isclose(found["ttft_lost_seconds_total"], 0.1)
        assert math.isclose(found["load_predicted_seconds_total"], 0.2)
        assert math.isclose(found["load_measured_seconds_total"], 0.4)
        assert found["load_error_ratio_bucket le=1.5"] == 0
        assert found["load_error_ratio_bucket le=2"] == 2
        assert found["load_seconds_count load=async"] == 2

    on_node(test, tier=MemoryTier())


@pytest.mark.parametrize("value", ["1", None, True, -1, math.nan, math.inf, 2 * MOST, [1], {}])
def test_a_record_that_lies_counts_nothing(value: Any) -> None:
    async def test(node: Node) -> None:
        names = ("prompt_tokens", "local_tokens", "load_s", "load_s_expected", "load_instead_s")
        node.record(ME, p.Record({**dict.fromkeys(names, value), "load": value}))
        node.record(ME, p.Record({"tier_tokens": value, "load": "sync", "load_s": value}))
        node.record(ME, p.Record({"tier_tokens": {"host": value}, "load_s": 1, "load": "x"}))
        found = of(node)
        assert found["asked_tokens_total"] == found["engine_tokens_total"] == 0
        assert not any(name.startswith(("hit_tokens", "load_", "ttft")) for name in found)

    on_node(test)


def test_every_gauge_that_is_declared_is_measured() -> None:
    async def test(node: Node) -> None:
        await asyncio.sleep(0)
        measured = {value.name for value in node.measures.answer(ME, p.Metrics(1)).values}
        gauges = {name for name, metric in NODE.items() if metric.kind is Kind.GAUGE}
        of_fleet = {name for name in gauges if name.startswith("fleet_")}
        assert measured >= gauges - of_fleet - {"canary_ok"}
        for value in node.measures.answer(ME, p.Metrics(1)).values:
            assert value.labels.keys() == set(NODE[value.name].labels), value

    on_node(test, tier=MemoryTier())


def test_groups_are_what_is_declared() -> None:
    assert sum(map(len, GROUPS.values())) == len(NODE)
