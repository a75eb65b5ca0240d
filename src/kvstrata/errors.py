"""The error tree, by who must act.

::

    KVStrataError
    ├── ConfigError          the operator fixes the configuration
    ├── Incompatible         a version, format or byte order this build does not know
    │   └── LayoutMismatch   shape, dtype or order differs from what was declared
    ├── CorruptObject        drop the object: checksum, length or identity is wrong
    ├── TierUnavailable      skip the tier until it recovers
    │   ├── TierFull         stop writing to it; reading goes on
    │   └── ReadOnly         nor may this node ever write to it, until somebody grants that
    ├── DeadlineExceeded     stop waiting, count a miss
    ├── NodeUnavailable      the node is gone: recompute now, reattach later
    ├── Busy                 ask again later, or end something first
    └── UsageError           fix the calling code

A miss is a value, not an error. Only a connector turns these into misses.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class KVStrataError(Exception):
    """Base of everything KVStrata raises on purpose."""


class ConfigError(KVStrataError):
    """A configuration value is wrong.

    Args:
        path: dotted path of the key, for instance ``host.capacity``.
        problem: what is wrong and what was expected.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class Incompatible(KVStrataError):
    """The other side speaks a version, format or byte order that is unknown here."""


class LayoutMismatch(Incompatible):
    """A tensor's shape, dtype or byte order differs from what was declared."""


class CorruptObject(KVStrataError):
    """Stored bytes fail a check; the object must be dropped, never served."""


class TierUnavailable(KVStrataError):
    """A tier cannot be used now: an I/O error, a missing folder, a dead peer."""


class TierFull(TierUnavailable):
    """A tier takes no more objects; what it holds can still be read."""


class ReadOnly(TierUnavailable):
    """This node may not write to a tier; what it holds can still be read."""


class PeerRefused(TierUnavailable):
    """Another node does not take this one for one of its deployment, or the other way round."""


class DeadlineExceeded(KVStrataError):
    """The wait ended before the answer came."""


class NodeUnavailable(KVStrataError):
    """No node answers on the socket."""


class Busy(KVStrataError):
    """As much of this is under way as may be; ask again later."""


class UsageError(KVStrataError):
    """The calling code broke a documented rule."""


def did_you_mean(word: str, words: Sequence[str], prefix: str = "") -> str:
    """``"; did you mean lru?"``, or nothing where no word comes near beyond a common prefix."""
    rests = [other.removeprefix(prefix) for other in words]
    near = difflib.get_close_matches(word.removeprefix(prefix), rests, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
