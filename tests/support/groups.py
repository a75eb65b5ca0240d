"""Chunks of several layer groups for tests: full attention, a window, a recurrent state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Container, Mapping, Sequence
from typing import TypeVar

import pytest
from msgspec.structs import replace
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    RAW,
    arrive,
    payload,
    stored_payload,
    template,
    write,
)

from kvstrata.node import grouped, matching
from kvstrata.node.common import slices
from kvstrata.node.node import Node
from kvstrata.node.slots import boundaries
from kvstrata.node.slots.clients import Client
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

FULL, WINDOW, STATE = 0, 1 << 16, 2 << 16
KINDS = {FULL: ("full", 0), WINDOW: ("sliding", 256), STATE: ("recurrent", 0)}
R = TypeVar("R")
Needs = Mapping[int, int]
"""Of each part, how many of the last chunks a boundary needs; 0: all."""


async def answered(answer: R | Awaitable[R]) -> R:
    """What a node says, at once or later."""
    return await answer if isinstance(answer, Awaitable) else answer


def group_template(part: int, nbytes: int = RAW) -> p.Template:
    kind, boundary = KINDS[part]
    return replace(template(nbytes=nbytes), group=part >> 16, group_kind=kind, boundary=boundary)


async def store_part(
    node: Node,
    client: Client,
    keys: Sequence[bytes],
    part: int,
    first: int = 0,
    stop: int | None = None,
    cost: float = 0.0,
    namespace: bytes = NAMESPACE,
) -> int:
    """Store one part of some chunks of a prompt; how many were written."""
    prefix = keys[:stop]
    request = p.Reserve(1, namespace, b"".join(prefix), first, part, group_template(part), cost)
    reserved = await answered(node.reserve(client, request))
    sums = write(node, prefix[first:], list(offsets_of(reserved.offsets)), part)
    commit = p.Commit(1, reserved.reservation, b"".join(sums))
    return (await answered(node.commit(client, commit))).count


async def match_needs(
    node: Node,
    client: Client,
    keys: Sequence[bytes],
    needs: Needs,
    tiers: Sequence[str] = (),
    chunk_s: float = 0.0,
) -> p.Matched:
    answer = node.match(client, p.Match(
        1, b"".join(keys), list(needs), [ORDER], [RAW] * len(needs), namespace=NAMESPACE,
        tiers=list(tiers), needs=list(needs.values()), chunk_s=chunk_s,
    ))  # fmt: skip
    return await answered(answer)


async def load_needs(
    node: Node, client: Client, keys: Sequence[bytes], needs: Needs, tiers: Sequence[str] = ()
) -> int:
    """Match, wait for all of it, compare what is needed, release; the boundary, 0 if it failed."""
    matched = await match_needs(node, client, keys, needs, tiers)
    boundary, parts = len(matched.tiers), list(needs)
    if not boundary:
        assert matched.lease == 0
        return 0
    ready, offsets = 0, list[int]()
    while ready < boundary:
        arrived = await asyncio.wait_for(arrive(node, client, matched.lease, ready), 60)
        if arrived.failed:
            assert arrived.ready == 0
            node.release(client, p.Release(matched.lease))
            return 0
        offsets += offsets_of(arrived.offsets)
        ready = arrived.ready
    assert len(offsets) == boundary * len(parts)
    for place, offset in enumerate(offsets):
        number, part = place // len(parts), parts[place % len(parts)]
        if needed(needs[part], boundary, number):
            assert stored_payload(node, offset) == payload(keys[number], part)
        else:
            assert offset == p.NEEDLESS
    node.release(client, p.Release(matched.lease))
    return boundary


def in_small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a node do matches in as many slices as can be."""
    monkeypatch.setattr(slices, "HOLD_S", 0.0)
    monkeypatch.setattr(grouped, "WALK_SLICE", 1)
    monkeypatch.setattr(boundaries, "SLICE", 1)
    monkeypatch.setattr(matching, "SLICE", 2)
    monkeypatch.setattr(matching, "SLICE_OBJECTS", 2)
    monkeypatch.setattr(grouped, "SLICE", 2)
    monkeypatch.setattr(matching, "SLICE_STARTS", 1)
    monkeypatch.setattr(grouped, "NOTE_SLICE", 2)


def needed(need: int, boundary: int, number: int) -> bool:
    """Whether a boundary needs a part of a chunk before it."""
    return not need or number >= boundary - need


def longest_of(has: Container[tuple[int, int]], needs: Needs, count: int) -> int:
    """The longest boundary of a prompt, by the rule and nothing else.

    Args:
        has: what is there, by part and number of the chunk.
        needs: of the parts.
        count: chunks of the prompt.
    """
    for boundary in range(count, 0, -1):
        if all(
            (part, number) in has
            for part, need in needs.items()
            for number in range(boundary)
            if needed(need, boundary, number)
        ):
            return boundary
    return 0
