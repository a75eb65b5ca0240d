"""Numbers out of requests' records, which engines of any release write: what is none counts 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST = 1e9
"""Tokens or seconds of one request; a record that says more says nothing."""


def number(record: Mapping[str, Any], name: str) -> float:
    """What a record says under a name."""
    value = record.get(name, 0)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST:
        return value
    return 0
