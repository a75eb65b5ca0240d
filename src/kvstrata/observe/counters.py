"""Counters with labels, in the form Prometheus names them."""

from __future__ import annotations

from collections import defaultdict


class Counters:
    """Monotonic numbers, each under a name and labels; owned by one thread.

    A counter's key reads like ``hits_total{tier="disk"}``.
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(int)
        self._keys: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Raise a counter, which begins at zero."""
        known = (name, tuple(labels.items()))
        key = self._keys.get(known)
        if key is None:
            text = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
            key = self._keys[known] = f"{name}{{{text}}}" if text else name
        self._values[key] += value

    def get(self, name: str, **labels: str) -> float:
        """A counter's value; zero if nothing was counted."""
        text = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
        return self._values.get(f"{name}{{{text}}}" if text else name, 0)

    def snapshot(self) -> dict[str, float]:
        """All counters, sorted by name."""
        return dict(sorted(self._values.items()))
