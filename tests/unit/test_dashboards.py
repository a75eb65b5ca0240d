"""Grafana's dashboard and Prometheus' alerts: every query is one, of metrics that a node has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tests.support.nodes import (
    GatedTier,
    chunk_keys,
    clear,
    flush,
    load,
    on_node,
    store,
)

from kvstrata.config import load_config
from kvstrata.node.node import Node
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.slots.clients import Client
from kvstrata.observe.catalogue import (
    ENGINE,
    ENGINE_PREFIX,
    NODE,
    NODE_PREFIX,
    Kind,
    Metric,
    by_name,
)
from kvstrata.observe.rendering import render
from kvstrata.tiers.faulty import FaultyTier, FlipBit, Raise
from kvstrata.wire import protocol as p

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS, DASHBOARD = DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana" / "kvstrata.json"
FROM_PROMETHEUS = {"instance", "job"}
ME = Client("pid 1")

DECLARED = {
    prefix + name: metric
    for prefix, metrics in ((NODE_PREFIX, NODE), (ENGINE_PREFIX, by_name(ENGINE)))
    for name, metric in metrics.items()
}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[tuple[str, str, str]]:
    """Where it stands, the query, and the words that name its labels."""
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"], str(rule["annotations"])
    for panel in panels():
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "5m")
            yield f"panel {panel['title']}", expression, target["legendFormat"]


QUERIES = list(queries())


def selectors(expression: Any) -> Iterator[Any]:
    """Every choice of series in a query."""
    found: list[Any] = []

    def enter(node: Any) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql.walk(expression, enter)
    assert found
    yield from found


def metric_of(name: str) -> Metric:
    """The metric that a series is of. Raises KeyError if there is none."""
    if name in DECLARED:
        return DECLARED[name]
    base = re.sub("_(bucket|count|sum)$", "", name)
    metric = DECLARED[base]
    assert metric.kind is Kind.HISTOGRAM, f"{name}: {base} is no histogram"
    return metric


@pytest.mark.parametrize(("where", "query", "words"), QUERIES, ids=[one[0] for one in QUERIES])
def test_every_query_is_one_of_metrics_that_are_declared(
    where: str, query: str, words: str
) -> None:
    parsed = promql.parse(query)
    labels = set(FROM_PROMETHEUS)
    for selector in selectors(parsed):
        metric = metric_of(selector.name)
        known = {*metric.labels, *FROM_PROMETHEUS, "le"}
        labels |= set(metric.labels)
        for matcher in selector.matchers.matchers:
            assert matcher.name in known, f"{where}: {selector.name} has no {matcher.name}"
        if metric.kind is Kind.COUNTER and selector.name.startswith("kvstrata"):
            assert re.search(rf"(rate|increase)\({selector.name}|{selector.name} ", query), where
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        named = {label.strip() for label in group.split(",")}
        assert named <= labels | {"le"}, f"{where}: by {named}"
        labels &= named | FROM_PROMETHEUS if where.startswith("panel") else labels
    for label in re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", words):
        assert label in labels, f"{where}: {label} is told, and not there"


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Everything that a node under a small load shows, with a little of all that goes wrong."""
    texts: list[bytes] = []

    async def ordinary(node: Node) -> None:
        for prompt in range(3):
            store(node, ME, chunk_keys(4, prompt))
        await flush(node, ME)
        await clear(node, ME, None, ["host"])
        await load(node, ME, [*chunk_keys(4), *chunk_keys(1, 9)])
        await node.canary.send("host")
        await node.canary.send("memory")
        record = {"outcome": "stopped", "prompt_tokens": 9, "local_tokens": 3, "load": "async",
                  "tier_tokens": {"host": 6}, "load_s": 1, "load_s_expected": 1,
                  "reasons": [{"why": "evicted", "tokens": 1}], "load_instead_s": 2}  # fmt: skip
        node.record(ME, p.Record(record))
        texts.append(render(node.measures.answer(ME, p.Metrics(1))))

    on_node(ordinary, tier=GatedTier(), slots=6, codec="lossless")

    gated = GatedTier()
    tier = FaultyTier(gated)

    async def troubled(node: Node) -> None:
        for prompt in range(3):
            store(node, ME, chunk_keys(2, prompt))
            await flush(node, ME)
        await clear(node, ME, None, ["host"])
        faults: tuple[FlipBit | Raise, ...] = (
            FlipBit(8 * 5000),
            FlipBit(8 * 8),
            Raise(RuntimeError("a bug")),
        )
        for prompt, fault in enumerate(faults):
            tier.inject("read", fault, times=1)
            await load(node, ME, chunk_keys(2, prompt))
        texts.append(render(node.measures.answer(ME, p.Metrics(1))))

    on_node(troubled, tier=tier, slots=6)

    async def slow(node: Node) -> None:
        gated.shut("write")
        store(node, ME, chunk_keys(5))
        gated.open()
        texts.append(render(node.measures.answer(ME, p.Metrics(1))))

    on_node(slow, tier=gated, slots=6, queue_slots=3)

    async def crowded(node: Node) -> None:
        store(node, ME, chunk_keys(3))
        node.match(ME, p.Match(1, b"".join(chunk_keys(3)), [0], ["test/order"], [5000]))
        texts.append(render(node.measures.answer(ME, p.Metrics(1))))

    on_node(crowded, slots=4, total=0.5)

    folder = tmp_path_factory.mktemp("node")
    (folder / "disk").write_text("no folder")
    options = {"host.capacity": "1MiB", "disk.path": str(folder / "disk"), "disk.capacity": "1MiB",
               "secret_file": str(folder / "secret"), "canary": "off"}  # fmt: skip
    with InProcessNode(load_config(environ={}, overrides=options)) as inprocess:
        client = inprocess.connect()
        with pytest.raises(Exception, match="no lease"):
            client.await_arrival(99, 0).wait(10)
        texts.append(render(client.metrics()))
        client.close()
    return [
        sample
        for text in texts
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    ]


@pytest.mark.parametrize(("where", "query", "words"), QUERIES, ids=[one[0] for one in QUERIES])
def test_every_series_that_is_asked_for_is_produced(
    where: str, query: str, words: str, produced: list[Sample]
) -> None:
    for selector in selectors(promql.parse(query)):
        if not selector.name.startswith(NODE_PREFIX):
            continue  # an engine's: tests/connector/test_stats.py
        samples = [one for one in produced if one.name == selector.name]
        assert samples, f"{where}: nothing is called {selector.name}"
        for matcher in selector.matchers.matchers:
            if matcher.name not in FROM_PROMETHEUS:
                values = {one.labels[matcher.name] for one in samples}
                assert any(re.fullmatch(matcher.value, value) for value in values), (
                    f"{where}: no {selector.name} has {matcher.name}={matcher.value}: {values}"
                )


def test_alerts_are_told_apart_and_say_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("info", "warning"), "a cache never pages anybody"
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_the_dashboard_has_no_panel_twice_nor_over_another() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_alerts_fire_when_they_should() -> None:
    """By Prometheus' own tool, where there is one."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    for verb, file in (("check", ALERTS), ("test", ALERTS.with_name("alerts_test.yml"))):
        done = subprocess.run(
            [promtool, verb, "rules", file.name], cwd=file.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
