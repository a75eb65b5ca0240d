"""Metrics as Prometheus reads them; done by whoever asked, never on the node's loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kvstrata.observe.catalogue import NODE, NODE_PREFIX

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Value(Protocol):
    """A counter or a gauge as it stands."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def value(self) -> float: ...


class Distribution(Protocol):
    """A histogram: how many values lie in each bucket alone, the last one without a bound."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def bounds(self) -> list[float]: ...
    @property
    def counts(self) -> list[int]: ...
    @property
    def sum(self) -> float: ...


class Measured(Protocol):
    """What `kvstrata.wire.client.NodeClient.metrics` answers."""

    @property
    def values(self) -> Iterable[Value]: ...
    @property
    def distributions(self) -> Iterable[Distribution]: ...


def render(measured: Measured) -> bytes:
    """Text of the exposition format, under `CONTENT_TYPE`.

    A metric of a node of another release, which is not in the catalogue, is left out.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(measured))
    return generate_latest(registry)


class _Collector:
    """Hands what was measured to prometheus-client."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for one in self._measured.values:
            if (metric := NODE.get(one.name)) is None:
                continue
            if one.name not in families:
                kind = CounterMetricFamily if one.name.endswith("_total") else GaugeMetricFamily
                families[one.name] = kind(
                    NODE_PREFIX + one.name, metric.about, labels=metric.labels
                )
            labels = [one.labels.get(label, "") for label in metric.labels]
            families[one.name].add_metric(labels, one.value)  # type: ignore[attr-defined]
        for seen in self._measured.distributions:
            if (metric := NODE.get(seen.name)) is None:
                continue
            if seen.name not in families:
                families[seen.name] = HistogramMetricFamily(
                    NODE_PREFIX + seen.name, metric.about, labels=metric.labels
                )
            bounds = [*(f"{bound:g}" for bound in seen.bounds), "+Inf"]
            families[seen.name].add_metric(  # type: ignore[attr-defined]
                [seen.labels.get(label, "") for label in metric.labels],
                list(zip(bounds, accumulate(seen.counts), strict=True)),
                seen.sum,
            )
        yield from families.values()
