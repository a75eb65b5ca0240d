"""What a client says of the cache with its request, decoded strictly and as far as it is allowed.

It comes in ``kv_transfer_params`` under ``kvstrata``, from somebody who is not trusted with the
cache, so it may be anything. What cannot be taken as it is is refused in words, one hint at a time,
and the others count: a hint never fails a request.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from kvstrata.blend.segments import Asked, asked
from kvstrata.config.kinds import HINTS
from kvstrata.policies.base import PRIORITIES

MAX_SESSION = 100
MAX_PIN_S = 7 * 86400
"""A pin is renewed by the next request; what is not used for a week need not be pinned."""
MAX_TIERS = 16
MAX_UNKNOWN = 4
"""Names of a request that are no hints, and are told."""
MAX_NAME = 32
MAX_WHY = 96
NO_LIMIT = sys.maxsize
OF_PEERS = ("peer", "running", "secret")
"""What stands beside the hints for `kvstrata.connectors.naming.roles`."""

_Tokens = Annotated[int, Meta(ge=0, le=1 << 40)]
_TYPES: Mapping[str, Any] = {
    "max_load_tokens": _Tokens,
    "max_store_tokens": _Tokens,
    "store": bool,
    "load": bool,
    "session": Annotated[str, Meta(min_length=1, max_length=MAX_SESSION)],
    "pin": Annotated[int, Meta(ge=1, le=MAX_PIN_S)],
    "priority": Annotated[int, Meta(ge=PRIORITIES[0], le=PRIORITIES[-1])],
    "blend": Asked,
    "tiers": Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]],
        Meta(min_length=1, max_length=MAX_TIERS),
    ],
}
assert _TYPES.keys() == set(HINTS)


class Hints(NamedTuple):
    """What a request asks of the cache.

    Args:
        given: hints that count, by name, as they came.
        refused: those that do not, by name, and why.
    """

    given: Mapping[str, Any] = {}
    refused: Mapping[str, str] = {}

    @property
    def load_limit(self) -> int:
        """Tokens from the start of the prompt that may be loaded."""
        most = int(self.given.get("max_load_tokens", NO_LIMIT))
        return most if self.given.get("load", True) else 0

    @property
    def store_limit(self) -> int:
        """Tokens from the start of the request that may be stored."""
        most = int(self.given.get("max_store_tokens", NO_LIMIT))
        return most if self.given.get("store", True) else 0

    @property
    def pin_s(self) -> int:
        """Seconds for which what was stored or hit is to be pinned; 0: not at all."""
        return int(self.given.get("pin", 0))

    @property
    def priority(self) -> int:
        """As of `kvstrata.policies.base.Policy.insert`."""
        return int(self.given.get("priority", 0))

    @property
    def tiers(self) -> list[str]:
        """Names of the tiers to use; none: all."""
        return list(self.given.get("tiers", ()))

    def pin_name(self, last: bytes) -> str:
        """Of the pin of a request: one for a session, else one for the prompt's last key."""
        session = self.given.get("session")
        return f"session {session}" if session else f"prompt {last.hex()[:32]}"

    def on(self, tiers: Collection[str]) -> Hints:
        """What is left of it on a node with these tiers."""
        unknown = next((name for name in self.tiers if name not in tiers), None)
        if unknown is None:
            return self
        return self.without("tiers", f"the node has no tier {_shown(unknown)}")

    def without(self, name: str, why: str) -> Hints:
        """What is left of it where one of the hints is refused after all."""
        given = {one: value for one, value in self.given.items() if one != name}
        return Hints(given, {**self.refused, name: _printable(why, MAX_WHY)})

    def record(self) -> dict[str, Any]:
        """For the request's record; empty where nothing was said."""
        record: dict[str, Any] = {}
        if self.given:
            record["hints"] = {
                name: value.shown() if isinstance(value, Asked) else value
                for name, value in self.given.items()
            }
        if self.refused:
            record["hints_refused"] = dict(self.refused)
        return record


def hints(params: Any, allowed: Collection[str]) -> Hints:
    """What a request's ``kv_transfer_params`` say of the cache; raises nothing.

    Args:
        params: as they came.
        allowed: the hints that clients may give.
    """
    ours = params.get("kvstrata") if isinstance(params, dict) else None
    if ours is None:
        return Hints()
    if not isinstance(ours, dict):
        return Hints(refused={"kvstrata": "not an object"})
    given: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in HINTS:
        if ours.get(name) is None:
            continue
        try:
            if name not in allowed:
                raise ValueError("not allowed here: see the operator's option hints")
            given[name] = _taken(name, ours[name])
        except ValueError as error:
            refused[name] = _printable(str(error), MAX_WHY)
    unknown = (name for name in ours if name not in HINTS and name not in OF_PEERS)
    for name in itertools.islice(unknown, MAX_UNKNOWN):
        refused[_shown(name)] = "no such hint"
    return Hints(given, refused)


def forwarded(params: Mapping[str, Any], sent: Any) -> dict[str, Any]:
    """A proxy's ``kv_transfer_params`` for an engine, with the hints that its client sent."""
    hints = sent.get("kvstrata") if isinstance(sent, dict) else None
    if not isinstance(hints, dict):
        return dict(params)
    kept = {name: value for name, value in hints.items() if name not in OF_PEERS}
    ours = params.get("kvstrata")
    return {**params, "kvstrata": {**kept, **(ours if isinstance(ours, dict) else {})}}


def _taken(name: str, value: Any) -> Any:
    """A hint's value. Raises ValueError for one that it cannot have."""
    if name == "blend":
        return asked(value)
    taken = msgspec.convert(value, _TYPES[name])
    texts = [taken] if isinstance(taken, str) else taken if isinstance(taken, list) else []
    if not all(text.isprintable() for text in texts):
        raise ValueError("Expected printable characters")
    return taken


def _shown(name: Any) -> str:
    """A name that a client gave, fit for a record."""
    return _printable(name if isinstance(name, str) else type(name).__name__, MAX_NAME)


def _printable(text: str, most: int) -> str:
    """The beginning of a text that a client may have had its part in."""
    return (text[:most] if text.isprintable() else ascii(text[:most])[1:-1])[:most]
