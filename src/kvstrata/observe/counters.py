"""What is counted, under names and labels that the catalogue declares."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from kvstrata.observe.catalogue import NODE, Kind

Labels = tuple[tuple[str, str], ...]


class Value(NamedTuple):
    """A counter or a gauge as it stands."""

    name: str
    labels: dict[str, str]
    value: float


class Distribution(NamedTuple):
    """A histogram as it stands: how many values in each bucket, the last one without a bound."""

    name: str
    labels: dict[str, str]
    bounds: tuple[float, ...]
    counts: list[int]
    sum: float


class _Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0


class Counters:
    """Monotonic numbers and histograms, each under a name and labels; owned by one thread.

    A counter's key reads like ``hits_total{tier="disk"}``. What the catalogue does not declare is a
    bug: an AssertionError, when it is counted for the first time.
    """

    def __init__(self) -> None:
        # By labels in the order that a caller has them, which may be several for one series.
        self._slots: dict[tuple[str, Labels], list[float]] = {}
        self._values: dict[tuple[str, Labels], list[float]] = {}
        self._seen: dict[tuple[str, Labels], _Histogram] = {}
        self._histograms: dict[tuple[str, Labels], _Histogram] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Raise a counter, which begins at zero."""
        key = (name, tuple(labels.items()))
        slot = self._slots.get(key)
        if slot is None:
            same = _declared(name, labels, Kind.COUNTER)
            slot = self._slots[key] = self._values.setdefault(same, [0])
        slot[0] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Enter a value into a histogram."""
        key = (name, tuple(labels.items()))
        seen = self._seen.get(key)
        if seen is None:
            same = _declared(name, labels, Kind.HISTOGRAM)
            new = _Histogram(NODE[name].buckets)
            seen = self._seen[key] = self._histograms.setdefault(same, new)
        # A value that equals a bound is below it, as Prometheus has it.
        seen.counts[bisect_left(seen.bounds, value)] += 1
        seen.sum += value

    def get(self, name: str, **labels: str) -> float:
        """A counter's value; zero if nothing was counted."""
        slot = self._values.get((name, tuple(sorted(labels.items()))))
        return slot[0] if slot is not None else 0

    def values(self) -> Iterator[Value]:
        """All counters."""
        for (name, labels), slot in self._values.items():
            yield Value(name, dict(labels), slot[0])

    def distributions(self) -> Iterator[Distribution]:
        """All histograms."""
        for (name, labels), seen in self._histograms.items():
            yield Distribution(name, dict(labels), seen.bounds, list(seen.counts), seen.sum)

    def snapshot(self) -> dict[str, float]:
        """All counters by their keys, sorted."""
        found = {}
        for name, labels, value in self.values():
            text = ",".join(f'{label}="{labels[label]}"' for label in labels)
            found[f"{name}{{{text}}}" if text else name] = value
        return dict(sorted(found.items()))


def _declared(name: str, labels: dict[str, str], kind: Kind) -> tuple[str, Labels]:
    metric = NODE.get(name)
    assert metric is not None, f"{name} is not declared in observe/catalogue.py"
    assert metric.kind is kind, f"{name} is a {metric.kind.value}"
    assert labels.keys() == set(metric.labels), f"{name} has the labels {metric.labels}"
    return name, tuple(sorted(labels.items()))
