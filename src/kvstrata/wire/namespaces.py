"""Namespaces by their parts: what engines tell a node, so that two nodes can be compared.

Keys hold a digest of the parts, and two digests only say that something differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import msgspec

from kvstrata.errors import UsageError
from kvstrata.keys import Namespace

MAX_DETAILS = 16
MAX_DETAIL_CHARS = 256
MAX_ORDERS = 16
MAX_OBJECTS = 1024

_Text = Annotated[str, msgspec.Meta(max_length=MAX_DETAIL_CHARS)]


class Described(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A namespace, and what its model's fingerprint is made of, in words.

    Args:
        parts: every field of the digest.
        model: of the model: name, weights, dtype and whatever else decides its fingerprint.
        orders: the byte orders that the engine reads; empty: not told.
        objects: the parts that make up a chunk; empty: not told.
        needs: of each of them, how many of the last chunks a boundary needs, 0: all; empty: all.
        lengths: of each of them, bytes of its payload; empty: not told.
    """

    parts: Namespace
    model: Annotated[dict[_Text, _Text], msgspec.Meta(max_length=MAX_DETAILS)] = {}
    orders: Annotated[list[_Text], msgspec.Meta(max_length=MAX_ORDERS)] = []
    objects: Annotated[list[int], msgspec.Meta(max_length=MAX_OBJECTS)] = []
    needs: Annotated[list[int], msgspec.Meta(max_length=MAX_OBJECTS)] = []
    lengths: Annotated[list[int], msgspec.Meta(max_length=MAX_OBJECTS)] = []

    def needs_of(self, parts: Sequence[int]) -> list[int]:
        """What a boundary needs of these parts; empty: every chunk of each."""
        return self.needs if any(self.needs) and list(parts) == self.objects else []

    def record(self) -> dict[str, Any]:
        """As an engine hands it in: the record of no request."""
        return {"namespace": msgspec.to_builtins(self)}

    def shown(self) -> dict[str, Any]:
        """As a node's status shows it."""
        return {"digest": self.parts.digest().hex(), **msgspec.to_builtins(self)}


def differing(one: Described, other: Described) -> list[str]:
    """The parts in which two namespaces differ; of the models, what in them does."""
    theirs = asdict(other.parts)
    parts = [part for part, value in asdict(one.parts).items() if value != theirs[part]]
    told = {**one.model, **other.model}
    if "pages" in parts:  # their fingerprints are made of different things, whatever the model is
        parts = [part for part in parts if part != "model"]
        told = {detail: "" for detail in one.model if detail in other.model}
    details = [
        detail
        for detail in told
        if detail != "name" and one.model.get(detail) != other.model.get(detail)
    ]
    if not details or not {"model", "pages"} & {*parts}:
        return parts
    return [*details, *(part for part in parts if part != "model")]


class Shown(Described, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same out of a node's status."""

    digest: str


def described(record: dict[str, Any]) -> Described:
    """What an engine handed in.

    Raises:
        UsageError: it is no namespace.
    """
    try:
        told = msgspec.convert(record["namespace"], Described)
    except msgspec.ValidationError as error:
        raise UsageError(f"a record of a namespace that is none: {error}") from error
    for what, numbers, least in (("needs", told.needs, 0), ("lengths", told.lengths, 1)):
        if numbers and (len(numbers) != len(told.objects) or min(numbers) < least):
            raise UsageError(f"{len(told.objects)} objects do not go with the {what} {numbers}")
    return told
