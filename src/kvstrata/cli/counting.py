"""A node's counters as the commands read them: by name, and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

TROUBLE: Mapping[str, str] = {
    "corrupt_objects_total": "objects failed their checksum and were dropped",
    "promotions_failed_total": "objects could not be read back when they were asked for",
    "tier_trips_total": "times a tier was left alone after an error",
    "tiers_left_out_total": "tiers could not be opened at start",
    "write_behind_skipped_total": "objects were not written to a slower tier",
    "matches_cut_total": "matches were cut short, too much of the pool being leased",
}
"""Counters that stay at zero while all is well, and what each counts."""


def labelled(counters: Mapping[str, float], name: str) -> dict[str, float]:
    """One counter's values by their labels, such as ``tier="disk"``; empty where it has none."""
    found = {}
    for key, value in counters.items():
        base, _, labels = key.partition("{")
        if base == name:
            found[labels.removesuffix("}")] = value
    return found


def label_values(labels: str) -> list[str]:
    """The values alone: ``tier="disk",why="queue"`` has ``disk`` and ``queue``."""
    return re.findall('"([^"]*)"', labels)


def total(counters: Mapping[str, float], name: str, *values: str) -> float:
    """A counter's sum over its labels, or over those that have all of these values."""
    return sum(
        value
        for labels, value in labelled(counters, name).items()
        if set(values) <= set(label_values(labels))
    )
