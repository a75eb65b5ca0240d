"""A node's counters as the commands read them: by name, and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

TROUBLE: tuple[tuple[str, str, str], ...] = (
    ("corrupt_objects_total", "", "objects failed their checksum and were dropped"),
    ("incompatible_objects_total", "", "objects of another release, codec or key were left alone"),
    ("promotions_total", "failed", "objects could not be read back when they were asked for"),
    ("tier_trips_total", "", "times a tier was left alone after an error"),
    ("tier_writes_total", "failed", "objects could not be written to a slower tier"),
    ("tiers_left_out_total", "", "tiers could not be opened at start"),
    ("write_behind_skipped_total", "", "objects were not written to a slower tier"),
    ("matches_cut_total", "", "matches were cut short, too much of the pool being leased"),
    ("requests_refused_total", "", "requests of clients were refused"),
    ("disconnects_total", "", "clients were disconnected for what they sent"),
    ("bugs_total", "", "bugs in KVStrata, with their trace in the node's log: please report them"),
)
"""Counters that stay at zero while all is well: name, the label that counts, and what it counts."""


def troubles(counters: Mapping[str, float]) -> list[str]:
    """Whatever has gone wrong since the node started, in words."""
    found = []
    for name, label, meaning in TROUBLE:
        for labels, value in labelled(counters, name).items():
            values = label_values(labels)
            if value and (not label or label in values):
                where = ", ".join(value for value in values if value != label)
                found.append(f"{value:.0f} {meaning}" + (f" ({where})" if where else ""))
    return found


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
