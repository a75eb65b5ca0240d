"""A table and a later run over some codecs, made one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvstrata.errors import UsageError
from kvstrata.quality.table import Table

_SAME = {
    "weights": "other weights",
    "text": "another text",
    "lengths": "other lengths of contexts",
    "windows": "another number of windows",
    "machine": "speeds of another machine (--speeds measures them again)",
}


def comparable(old: Table, new: Table) -> None:
    """Check that rows of both may stand in one table.

    Raises:
        UsageError: something but the codecs differs; the message says what.
    """
    differ = [words for field, words in _SAME.items() if getattr(old, field) != getattr(new, field)]
    if differ:
        raise UsageError(
            f"the table of {old.model} that is there has {', '.join(differ)}. It stays as it is: "
            "measure all codecs, without --codec, or let --json say where this one goes"
        )


def merged(old: Table, new: Table, order: Sequence[str]) -> Table:
    """The old table with the rows of the new one added, or put in place of theirs.

    Args:
        old, new: of the same measurement; all but rows is taken from the new one.
        order: names of codecs as they shall stand; what it does not name stands at the end.
    Raises:
        UsageError: see `comparable`.
    """
    comparable(old, new)
    rows = {row.name: row for row in new.codecs}
    measured = {*rows, *new.left_out}
    rows |= {row.name: row for row in old.codecs if row.name not in measured}
    left_out = {name: why for name, why in old.left_out.items() if name not in measured}
    left_out |= new.left_out
    places = {name: place for place, name in enumerate(order)}

    def sort(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: places.get(name, len(places)))

    return msgspec.structs.replace(
        new,
        codecs=tuple(rows[name] for name in sort(rows)),
        left_out={name: left_out[name] for name in sort(left_out)},
    )
