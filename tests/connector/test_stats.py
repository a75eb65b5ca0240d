"""What the connector counts, by the way that vLLM takes it to its own ``/metrics``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families
from tests.connector.fake_model import CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt

from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.stats import MAX_SECONDS, METRICS, WHYS, ConnectorStats, Tally
from kvstrata.errors import UsageError
from kvstrata.observe.catalogue import ENGINE_PREFIX

Make = Callable[..., Rig]
LABELS: dict[int, list[object]] = {0: ["tiny", "0"], 1: ["tiny", "1"]}


class Heard:
    """What vLLM's scheduler hands on, of all steps, as the process that serves adds it up."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig = rig
        self.total = ConnectorStats()
        make_stats = rig.scheduler.make_stats

        def hearing(*arguments: Any, **named: Any) -> Any:
            stats = make_stats(*arguments, **named)
            if stats is not None and (data := stats.kv_connector_stats) is not None:
                self._hear(data)
            return stats

        monkeypatch.setattr(rig.scheduler, "make_stats", hearing)

    def _hear(self, data: dict[str, Any]) -> None:
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(data))
        built = KVStrataConnector.build_kv_connector_stats(sent)
        assert built is not None
        self.total = self.total.aggregate(built)

    @property
    def sums(self) -> dict[str, float]:
        for worker in self.rig.workers:
            if (stats := worker.tally.take()) is not None:
                self.total.aggregate(pickle.loads(pickle.dumps(stats)))
        sums: dict[str, float] = self.total.data["sums"]
        return sums


def test_what_is_asked_hit_and_stored(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(ranks=2)
    heard = Heard(rig, monkeypatch)
    tokens, length = prompt(3 * CHUNK + 5), 3 * CHUNK + 5
    rig.warm(tokens)
    rig.ask(tokens)
    sums = heard.sums
    assert sums["asked_tokens_total"] == 2 * length
    assert sums["hit_tokens_total|host"] == 3 * CHUNK
    assert sums["missed_requests_total|not stored"] == 1
    assert sums["loads_total|sync|ok"] == 1
    (took,) = heard.total.data["values"]["load_seconds|sync"]
    assert 0 < took < 60
    each = rig.workers[0].payloads[0].template.raw_length
    assert sums["stored_bytes_total"] == 2 * 3 * each, "of both ranks"
    assert not any(name.startswith("stores_dropped") for name in sums)
    rig.check()


def test_hits_are_told_by_tier_and_failures_too(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    heard = Heard(rig, monkeypatch)
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    rig.ask(tokens)
    name = next(key for key in heard.sums if key.startswith("hit_tokens_total|"))
    assert name != "hit_tokens_total|host"
    assert heard.sums[name] == 200 // CHUNK * CHUNK
    assert heard.sums["loads_total|async|ok"] == 1
    rig.check()


def test_a_request_without_a_node_says_so(make_rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(with_node=False)
    heard = Heard(rig, monkeypatch)
    rig.ask(prompt(100))
    assert heard.sums["missed_requests_total|no node"] == 1
    assert rig.connector.get_kv_connector_stats() is None, "taken, and nothing since"


def filled() -> ConnectorStats:
    tally = Tally()
    tally.add("asked_tokens_total", 10)
    tally.add("asked_tokens_total", 5)
    tally.add("loads_total", 2, "async", "ok")
    tally.observe("load_seconds", 0.3, "async")
    tally.observe("load_seconds", 0.01, "sync")
    taken = tally.take()
    assert taken is not None
    assert tally.take() is None
    return taken


def test_sides_are_added_up_and_summed_for_the_log() -> None:
    both = filled().aggregate(filled())
    assert both.data["sums"] == {"asked_tokens_total": 30, "loads_total|async|ok": 4}
    assert both.data["values"] == {"load_seconds|async": [0.3] * 2, "load_seconds|sync": [0.01] * 2}
    assert both.reduce() == {"asked_tokens": 30, "loads": 4, "most_load_seconds": 0.3}
    both.reset()
    assert both.is_empty()


def test_a_burst_of_values_is_bounded() -> None:
    tally = Tally()
    for _ in range(2 * MAX_SECONDS):
        tally.observe("load_seconds", 0.1, "async")
    taken = tally.take()
    assert taken is not None
    assert len(taken.aggregate(taken).data["values"]["load_seconds|async"]) == MAX_SECONDS


@pytest.mark.parametrize("why", ["not stored", "the load ended before chunk 7", "whatever /x?"])
def test_reasons_are_few(why: str) -> None:
    tally = Tally()
    tally.missed(why)
    taken = tally.take()
    assert taken is not None
    (key,) = [key for key in taken.data["sums"] if key.startswith("missed")]
    assert key.partition("|")[2] in (*WHYS, "other")


def test_it_becomes_prometheus_metrics_of_each_engine() -> None:
    registry = CollectorRegistry()
    kinds = {
        kind: lambda kind=kind, **options: kind(registry=registry, **options)
        for kind in (Counter, Gauge, Histogram)
    }
    metrics = KVStrataConnector.build_prom_metrics(
        _Config(), kinds, ["model_name", "engine"], LABELS
    )
    metrics.observe(filled().to_dict(), 0)
    metrics.observe(filled().to_dict(), 1)
    metrics.observe(filled().to_dict(), 1)
    text = generate_latest(registry).decode()
    found = {
        (sample.name.removeprefix(ENGINE_PREFIX), sample.labels["engine"]): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    assert found["asked_tokens_total", "0"].value == 15
    assert found["asked_tokens_total", "1"].value == 30
    loads = found["loads_total", "1"]
    assert loads.value == 4
    assert (loads.labels["load"], loads.labels["outcome"]) == ("async", "ok")
    assert found["load_seconds_count", "1"].value == 2
    # Every series that the catalogue has is there under vLLM's prefix, which vLLM cleans up by.
    assert all(f"{ENGINE_PREFIX}{name.removesuffix('_total')}" in text for name in METRICS)
    assert not any(ENGINE_PREFIX in family.name for family in REGISTRY.collect())


class _Config:
    kv_transfer_config = None


@pytest.mark.parametrize("name", ["x" * 70_000, "y" * 9000, "\ud800"])
def test_an_id_of_any_kind_is_recorded(make_rig: Make, name: str) -> None:
    rig = make_rig()
    rig.scheduler.add_request(rig.request(prompt(1, 2 * CHUNK), name=name))
    rig.tokens[name], rig.prompts[name], rig.answers[name] = prompt(1, 2 * CHUNK), 2 * CHUNK, []
    rig.run()
    told = rig.settle()["requests"][-1]["request"]
    assert told == name.encode(errors="replace").decode()[:255] + ("…" if len(name) > 255 else "")


def test_a_record_that_cannot_be_sent_is_counted(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(record: dict[str, Any]) -> None:
        raise UsageError("too long")

    rig = make_rig()
    heard = Heard(rig, monkeypatch)
    assert rig.side._lookups.client is not None
    monkeypatch.setattr(rig.side._lookups.client, "record", fail)
    rig.ask(prompt(1, CHUNK))
    assert rig.wrong() == []
    rig.ask(prompt(2, CHUNK))  # what the last step counted is handed on by the next one
    assert heard.sums["unrecorded_requests_total"] >= 1
