"""Reasons in sentences for people, each with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from kvstrata.observe.reasons import Unloaded, Why

_CAPS = {
    "leases": (
        "what one client may hold still was used up (leases.per_client, leases.total)",
        "raise the caps on leases, or host.capacity, which they are a share of",
    ),
    "room": (
        "host memory had no room to bring it into: everything there was in use",
        "raise host.capacity, or ask for fewer long prompts at once",
    ),
    "message": (
        "one match names 32,768 chunks at most",
        "use larger chunks (chunk_tokens)",
    ),
    "hints": (
        "the request said that no more was to be loaded",
        "nothing; its hints are in the record",
    ),
    "tiers": (
        "it is in {tier}, which the request left out",
        "nothing; its hints are in the record",
    ),
}
_DEADLINES = {
    "lookup": (
        "{tier} had not answered when the match could wait no longer",
        "see how far away {tier} is (`kvstrata doctor`); raise its lookup_timeout",
    ),
    "load": (
        "it was in {tier}, but was not brought in time",
        "see how fast {tier} is (`kvstrata status`); raise deadlines.load or its load_target",
    ),
}
_LATE_MATCH = (
    "the node had not answered when the request could wait no longer",
    "see whether the node has cores of its own and what it logs; raise deadlines.request",
)
_IN_PART = (
    "some of it is stored, but not all that is needed there: of a rank, a window or a recurrent "
    "state nobody has",
    "nothing, if a prompt parts there for the first time: this request stores what was missing",
)
_WORDS: Mapping[Why, tuple[str, str]] = {
    Why.NEVER: (
        "nobody has stored it, as far as this node knows",
        "nothing, if these tokens are new; if they were asked for before, ask `kvstrata explain` "
        "about that request",
    ),
    Why.EVICTED: (
        "it was evicted from {tier} to make room{ago}",
        "raise {tier}.capacity, add a slower tier, or pin what must stay",
    ),
    Why.CLEARED: ("it was cleared from {tier}{ago}", "nothing: somebody asked for it"),
    Why.CORRUPT: (
        "its bytes in {tier} were not those that had been stored, and were dropped{ago}",
        "look into the log and, of a disk, into its quarantine; run `kvstrata doctor`; check the "
        "hardware",
    ),
    Why.LOST: (
        "{tier} did not have it any more, or failed at it{ago}",
        "see the log, and whether anybody deletes files there",
    ),
    Why.MOVED: (
        "it was moved from {tier} to another tier, which did not have it either{ago}",
        "see what evicts there; `kvstrata lookup` says what is where",
    ),
    Why.ARRIVING: (
        "it was being stored at that moment",
        "nothing: the next request finds it",
    ),
    Why.ORDER: (
        "it is in {tier} in a byte order that this engine does not read",
        "run engines of one kind (attention backend, block size) on what they shall share",
    ),
    Why.TIER_OFF: (
        "{tier} was not in use: {detail}",
        "mend the tier; `kvstrata doctor` says what is wrong with it",
    ),
    Why.PLANNED: (
        "computing it was reckoned to be faster than to load it",
        'nothing; planner = "off" loads it all the same',
    ),
    Why.PARTIAL: (
        "the end of the prompt fills no chunk",
        "nothing; smaller chunks (chunk_tokens) leave a shorter end",
    ),
    Why.LAST: ("an engine computes at least one token", "nothing"),
    Why.BYPASSED: ("the request went past the cache: {detail}", "see Limits on the page vLLM"),
    Why.FAILED: (
        "it was found in {tier}, and then it could not be loaded{because}",
        "see the logs of engine and node at that time",
    ),
    Why.NO_NODE: (
        "the engine had no node{because}",
        "see whether the node runs (`kvstrata status`), and the engine's log",
    ),
    Why.ENGINE: (
        "the node had it, but the engine did not take it",
        "nothing, if the engine lacked blocks; else look into its log",
    ),
}
_PARTS = {
    "salt": ("another salt", "send one cache_salt with requests that may share"),
    "tenant": ("another tenant", "nothing: tenants never share"),
    "adapter": ("another adapter", "nothing: an adapter changes what the model computes"),
    "weights": ("other weights", "run engines of one revision"),
    "layout": ("another layout of the KV", "run engines with one KV dtype and one topology"),
    "chunk_tokens": ("chunks of another size", "give all engines one chunk_tokens"),
    "tensor_parallel": (
        "another size of tensor parallelism",
        'give all engines share = "ranks", if another rounding may count (docs/sharing.md)',
    ),
    "slices": ("another value of the option share", "give all engines the same value of share"),
    "pages": ("another value of the option share", "give all engines the same value of share"),
    "selection": ("selected tokens", "nothing: exact and selected KV never share"),
    "reset": ("an engine that was reset since", "nothing: its weights may have changed"),
    "unknown": ("another namespace that nobody has described", "see `kvstrata status`"),
}


class Sentence(NamedTuple):
    """What happened, and what to do."""

    text: str
    advice: str


def sentence(reason: Unloaded) -> Sentence:
    """A reason in words."""
    what, advice = _of(reason)
    ago = f" {_span(reason.ago_s)} before" if reason.ago_s else ""
    blanks = {
        "tier": "host memory" if reason.tier == "host" else reason.tier or "a tier",
        "detail": reason.detail or "nobody said why",
        "ago": ago,
        "because": f": {reason.detail}" if reason.detail else "",
    }
    tokens = f"{reason.tokens:,} token{'s' * (reason.tokens != 1)}"
    text = f"{tokens}: {what.format(**blanks)}."
    if reason.why is Why.NEVER and reason.ago_s:
        text += (
            f" A tier was cleared {_span(reason.ago_s)} before: not all that was there is known."
        )
    # An option's name has the tier's own name in it.
    blanks["tier"] = reason.tier or "the tier"
    return Sentence(text, advice.format(**blanks))


def sentences(reasons: list[dict[str, Any]]) -> list[Sentence]:
    """Those of a record, in the order of the prompt.

    Raises:
        msgspec.ValidationError: it is no record's.
    """
    return [sentence(one) for one in msgspec.convert(reasons, list[Unloaded])]


def _of(reason: Unloaded) -> tuple[str, str]:
    if reason.why is Why.CAPPED:
        return _CAPS.get(reason.detail, (reason.detail, "raise it"))
    if reason.why is Why.DEADLINE:
        return _DEADLINES.get(reason.detail, _LATE_MATCH)
    if reason.why is Why.NEVER and reason.detail == "parts":
        return _IN_PART
    if reason.why is not Why.NAMESPACE:
        return _WORDS[reason.why]
    parts = reason.detail.split(", ")
    words = [_PARTS.get(part, (f"another {part.replace('_', ' ')}", ""))[0] for part in parts]
    advice = [_PARTS[part][1] for part in parts if part in _PARTS]
    return (
        f"the same tokens are stored under {' and '.join(words)}",
        "; ".join(advice) or "run engines alike that shall share",
    )


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
