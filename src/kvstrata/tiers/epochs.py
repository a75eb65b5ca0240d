"""The small object in which a shared store keeps its present epoch: a line of text, then its marks.

``docs/format.md`` has the lines. A release that knows no marks takes an epoch with some for none,
and does not use the store: it would serve what was cleared. An epoch's number is random, so one
that was lost (a store that forgot it, a backup that was played back) is never begun a second time
by chance.
"""

from __future__ import annotations

import re
import secrets

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.base import EPOCH_BYTES, Epoch
from kvstrata.tiers.marks import MAX_IN_EPOCH, Mark, Marks, decode_marks

_LINE = re.compile(rb"kvstrata-epoch 1 ([0-9a-f]{16}) ([1-9][0-9]{0,8})\n")


def new_epoch(lasts_s: float) -> Epoch:
    """One that never was."""
    return Epoch(secrets.randbits(8 * EPOCH_BYTES), lasts_s)


def encode_epoch(epoch: Epoch) -> bytes:
    """The object's content."""
    line = b"kvstrata-epoch 1 %016x %d\n" % (epoch.number, round(1000 * epoch.lasts_s))
    return line + b"".join(mark.encode() for mark in epoch.marks)


def marked(epoch: Epoch, mark: Mark) -> Epoch:
    """The same epoch, in which what the mark covers counts as cleared."""
    marks = Marks(epoch.marks, MAX_IN_EPOCH)
    marks.add(mark)
    return epoch._replace(marks=tuple(marks))


def decode_epoch(content: bytes, where: str) -> Epoch:
    """The inverse.

    Raises:
        TierUnavailable: this is no epoch; with what to do.
    """
    found = _LINE.match(content)
    marks = None if found is None else decode_marks(content[found.end() :])
    if found is None or marks is None:
        raise TierUnavailable(
            f"{where} holds {content[:64]!r} and no epoch of this release; install one release "
            "everywhere, or remove that object: the cache begins anew then"
        )
    return Epoch(int(found[1], 16), int(found[2]) / 1000, marks)


def epoch_prefix(number: int) -> bytes:
    """What the names of an epoch begin with."""
    return number.to_bytes(EPOCH_BYTES, "big")
