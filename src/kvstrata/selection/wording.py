"""A method's parts in words, for people."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvstrata.selection.methods import Method


def parts_of(method: Method) -> tuple[str, str, str]:
    """Its score, its budget, and how it brings together what it is given.

    Every part is named, with what differs from the part's own defaults.
    """
    together = _words(method.aggregation, named=False)
    if method.merging is not None:
        together.append(f"merges {' '.join(_words(method.merging))}")
    for name, count in (("sinks", method.sinks), ("recent", method.recent)):
        if count:
            together.append(f"{name} {count}")
    return (
        " ".join(_words(method.score)),
        " ".join(_words(method.budget)),
        ", ".join(together) or "-",
    )


def _words(part: Any, named: bool = True) -> list[str]:
    words = [type(part).__name__] if named else []
    for field in fields(part):
        value = getattr(part, field.name)
        if value == field.default:
            continue
        if hasattr(value, "__dataclass_fields__"):
            words.append(f"of {' '.join(_every(value))}")
        else:
            words.append(f"{field.name} {value}")
    return words


def _every(part: Any) -> list[str]:
    """A source, whose size is what tells it from others."""
    values = [
        field.name if value is True else str(value)
        for field in fields(part)
        if (value := getattr(part, field.name)) is not False
    ]
    return [type(part).__name__, *values]
