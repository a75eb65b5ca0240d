"""Chunks of several layer groups between nodes: stored by one, matched and loaded by another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace
from tests.support.groups import Needs, group_template, needed
from tests.support.members import Member
from tests.support.nodes import NAMESPACE, ORDER, RAW, payload

from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

TAIL = 1200
"""Payload bytes of each part of a prompt's end."""


def store(
    member: Member,
    keys: Sequence[bytes],
    part: int,
    numbers: Iterable[int],
    *,
    tail: bool = False,
    namespace: bytes = NAMESPACE,
    **more: Any,
) -> None:
    """Store one part of some chunks; with a ``tail`` they are the end of a prompt."""
    nbytes = TAIL if tail else RAW
    template = group_template(part, nbytes)
    if tail:
        template = replace(template, num_tokens=30, chunk_tokens=128)
    for number in numbers:
        prefix = keys[: number + 1]
        call = member.client.reserve(namespace, prefix, number, part, template, **more)
        reserved = call.wait(5.0)
        (offset,) = offsets_of(reserved.offsets)
        data = payload(keys[number], part, nbytes=nbytes)
        if offset >= 0:
            member.client.pool.view(offset + HEADER_BYTES, nbytes)[:] = data
        member.client.commit(reserved.reservation, [checksum(data)]).wait(5.0)


def match(member: Member, keys: Sequence[bytes], needs: Needs, **more: Any) -> p.Matched:
    """What a node answers; the lease is the caller's."""
    matched: p.Matched = member.client.match(
        keys, list(needs), [ORDER], [RAW] * len(needs), namespace=NAMESPACE,
        needs=list(needs.values()), **more,
    ).wait(10.0)  # fmt: skip
    return matched


def load(
    member: Member, keys: Sequence[bytes], needs: Needs, matched: p.Matched, *, tail: bool = False
) -> int:
    """Wait for all of a match, compare what is needed, release; the boundary, 0 if it failed."""
    boundary, parts = len(matched.tiers), list(needs)
    if not boundary:
        assert matched.lease == 0
        return 0
    offsets = list[int]()
    while len(offsets) < boundary * len(parts):
        have = len(offsets) // len(parts)
        arrived: p.Arrived = member.client.await_arrival(matched.lease, have).wait(60.0)
        if arrived.failed:
            member.client.release(matched.lease)
            return 0
        offsets += offsets_of(arrived.offsets)
    more = 1 if tail and boundary == len(keys) else 0
    for place, offset in enumerate(offsets):
        number, part = place // len(parts), parts[place % len(parts)]
        if needed(needs[part] and needs[part] + more, boundary, number):
            nbytes = TAIL if more and number == boundary - 1 else RAW
            found = bytes(member.client.pool.view(offset + HEADER_BYTES, nbytes))
            assert found == payload(keys[number], part, nbytes=nbytes)
        else:
            assert offset == p.NEEDLESS
    member.client.release(matched.lease)
    return boundary


def held(member: Member, keys: Sequence[bytes], needs: Needs) -> set[tuple[int, int]]:
    """What is in host memory, by part and number of the chunk."""
    host = member.inprocess.node.host
    found: set[tuple[int, int]] = member.inprocess.run(
        lambda: {(part, n) for n, key in enumerate(keys) for part in needs if host.get(key, part)}
    )
    return found


def nothing_is_on_its_way(member: Member) -> None:
    """Return once no promotion is under way, and nothing is leased."""
    node = member.inprocess.node
    member.until(
        lambda: member.inprocess.run(
            lambda: not list(node.movement.under_way()) and not node.leases.leased_bytes
        )
    )
