"""Why tokens of a prompt were not loaded: the causes, and how many tokens fell to each.

Every token of a prompt was the engine's already, was loaded, or has one reason.
"""

from __future__ import annotations

from enum import Enum

import msgspec


class Why(str, Enum):
    """Why KV was not loaded. ``docs/reasons.md`` says of each what to do.

    The first five say what became of it in the node's own tiers, as `kvstrata.node.common.changes`
    tells of it.
    """

    EVICTED = "evicted"
    CLEARED = "cleared"
    CORRUPT = "corrupt"
    LOST = "lost"
    MOVED = "moved"
    NEVER = "never stored"
    ARRIVING = "arriving"
    NAMESPACE = "another namespace"
    ORDER = "another byte order"
    TIER_OFF = "tier off"
    DEADLINE = "deadline"
    CAPPED = "capped"
    PLANNED = "computing is faster"
    PARTIAL = "not a whole chunk"
    LAST = "last token"
    BYPASSED = "bypassed"
    FAILED = "the load failed"
    NO_NODE = "no node"
    ENGINE = "the engine took less"


class Reason(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Why some chunks that follow each other were not there.

    Args:
        why: the cause.
        chunks: how many.
        tier: which one it was about; empty where none was.
        detail: what else is known: which parts of a namespace differ, which cap, whose deadline.
        ago_s: seconds from what happened to the request, of the first of them; 0: nothing did, or
            it is not known when.
    """

    why: Why
    chunks: int
    tier: str = ""
    detail: str = ""
    ago_s: float = 0.0

    def goes_on(self, other: Reason) -> bool:
        """Whether the other is the same, of the chunks behind."""
        return (self.why, self.tier, self.detail) == (other.why, other.tier, other.detail)


class Unloaded(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reason in a request's record, by tokens.

    Args:
        why, tier, detail, ago_s: as of `Reason`.
        tokens: how many.
        key: of the chunk that did not come, in hex, where a load ended early.
    """

    why: Why
    tokens: int
    tier: str = ""
    detail: str = ""
    ago_s: float = 0.0
    key: str = ""
