"""What the connector counts inside an engine, on its way to the engine's own ``/metrics``.

vLLM collects it after each step from the scheduler's side and from each worker, adds it up, and
sends it to the process that serves; there it becomes Prometheus metrics beside vLLM's own.
"""

from __future__ import annotations

import threading
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvstrata.observe.catalogue import ENGINE, ENGINE_PREFIX, Kind, by_name

METRICS = by_name(ENGINE)
MAX_SECONDS = 1024
"""Values of one histogram between two collections; what is more is not entered."""
WHYS = (
    "no node",
    "shorter than a chunk",
    "not stored",
    "partly stored",
    "computing is faster",
    "the match missed its deadline",
    "the match failed",
    "the load failed",
    "the load ended",
)
"""How reasons of misses begin, of which each is a label."""


class ConnectorStats(KVConnectorStats):
    """Sums and lists of values since the last collection.

    ``data`` is what vLLM sends: ``{"sums": {key: number}, "values": {key: [number, ...]}}``, where
    a key is a metric's name and its labels' values with ``|`` between them.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {"sums": {}, "values": {}})

    def reset(self) -> None:
        """Forget all of it."""
        self.data: dict[str, Any] = {"sums": {}, "values": {}}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.data["sums"] or self.data["values"])

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Add another side's."""
        sums, values = self.data["sums"], self.data["values"]
        for key, number in other.data["sums"].items():
            sums[key] = sums.get(key, 0) + number
        for key, numbers in other.data["values"].items():
            values[key] = (values.get(key, []) + numbers)[:MAX_SECONDS]
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the line in vLLM's log."""
        sums: dict[str, float] = {}
        for key, number in self.data["sums"].items():
            name = key.partition("|")[0].removesuffix("_total")
            sums[name] = sums.get(name, 0) + number
        for key, numbers in self.data["values"].items():
            name = key.partition("|")[0]
            sums[f"most_{name}"] = round(max([sums.get(f"most_{name}", 0.0), *numbers]), 4)
        return sums


class Tally:
    """Counts on one side of the connector, in whichever thread."""

    def __init__(self) -> None:
        self._stats = ConnectorStats()
        self._lock = threading.Lock()

    def add(self, name: str, value: float, *labels: str) -> None:
        """Raise a counter."""
        key = "|".join((name, *labels))
        with self._lock:
            sums = self._stats.data["sums"]
            sums[key] = sums.get(key, 0) + value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Enter a value into a histogram."""
        with self._lock:
            values = self._stats.data["values"].setdefault("|".join((name, *labels)), [])
            if len(values) < MAX_SECONDS:
                values.append(value)

    def missed(self, why: str) -> None:
        """Count a request that loaded nothing, or not all that it might."""
        known = (one for one in WHYS if why.startswith(one))
        self.add("missed_requests_total", 1, next(known, "other"))

    def take(self) -> ConnectorStats | None:
        """What was counted since the last time; None: nothing."""
        if self._stats.is_empty():
            return None
        with self._lock:
            stats, self._stats = self._stats, ConnectorStats()
        return stats


class ConnectorPromMetrics(KVConnectorPromMetrics):
    """The connector's metrics in the process that serves; arguments as vLLM gives them."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {}
        for metric in ENGINE:
            options: dict[str, Any] = {"labelnames": [*labelnames, *metric.labels]}
            if metric.buckets:
                options["buckets"] = list(metric.buckets)
            kind = metric_types[Histogram if metric.kind is Kind.HISTOGRAM else Counter]
            name = ENGINE_PREFIX + metric.name
            self._metrics[metric.name] = kind(name=name, documentation=metric.about, **options)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Enter what one engine has sent."""
        engine = self.per_engine_labelvalues[engine_idx]
        for key, number in transfer_stats_data["sums"].items():
            name, *labels = key.split("|")
            self._metrics[name].labels(*engine, *labels).inc(number)
        for key, numbers in transfer_stats_data["values"].items():
            name, *labels = key.split("|")
            series = self._metrics[name].labels(*engine, *labels)
            for number in numbers:
                series.observe(number)
