"""Which chunks each node holds in which tier, as sets in the registry, and who asks for them.

A set is of one process of a node, so what an earlier one held is nobody's. It has the first half of
each key: a prompt's chunks are told apart by 128 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstrata.fleet.members import Member
from kvstrata.fleet.registry import Registry

ID_BYTES = 16
SLICE = 4000
"""Ids that one command of the script may have."""

# Of each set how many ids in turn are in it, are not, are again, and so on.
_HELD = """
local ids, width, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local slices, members = {}, {}
for i = 1, #ids, width do
  members[#members + 1] = string.sub(ids, i, i + width - 1)
  if #members == most then
    slices[#slices + 1] = members
    members = {}
  end
end
if #members > 0 then slices[#slices + 1] = members end
local answers = {}
for i = 1, #KEYS do
  local runs, held, count = {}, 1, 0
  for _, members in ipairs(slices) do
    for _, one in ipairs(redis.call('SMISMEMBER', KEYS[i], unpack(members))) do
      if one ~= held then
        runs[#runs + 1] = count
        held, count = one, 0
      end
      count = count + 1
    end
  end
  runs[#runs + 1] = count
  answers[i] = runs
end
return answers
"""


class Found(NamedTuple):
    """What a node has of a prompt.

    Args:
        member: the node.
        tiers: of each leading chunk that would hit, the fastest of its own tiers that has it; where
            nothing of it is needed, that of the last one.
    """

    member: Member
    tiers: list[str]


def id_of(key: bytes, part: int) -> bytes:
    """What an object is called in a set."""
    if not part:
        return key[:ID_BYTES]
    return blake3(key + part.to_bytes(4, "little")).digest(ID_BYTES)


def lookup(
    registry: Registry,
    keys: Sequence[bytes],
    parts: Sequence[int] = (0,),
    members: Sequence[Member] | None = None,
    needs: Sequence[int] = (),
) -> list[Found]:
    """Which nodes could go on with a prompt behind how many of its chunks, and out of which tiers.

    Args:
        registry: of the fleet.
        keys: of the prompt's chunks, head first.
        parts: what makes up a chunk.
        members: of whom to ask; None: of all that are registered.
        needs: of each part, how many of the last chunks are needed; 0, or none given: every one.
    Returns:
        Those that have anything, who has most first.
    Raises:
        TierUnavailable: the registry cannot be used.
    """
    if members is None:
        members = registry.members()
    asked = [(one, tiers) for one in members if (tiers := own_tiers(one))]
    ids = b"".join(id_of(key, part) for key in keys for part in parts)
    if not ids or not asked:
        return []
    sets = [registry.names.held(one.name, one.boot, tier) for one, tiers in asked for tier in tiers]
    with registry.call():
        answers = iter(registry.script(_HELD, sets, ids, ID_BYTES, SLICE))
    found = [
        Found(one, _leading(tiers, [next(answers) for _ in tiers], needs or [0] * len(parts)))
        for one, tiers in asked
    ]
    return sorted(
        (one for one in found if one.tiers), key=lambda one: (-len(one.tiers), one.member.name)
    )


def own_tiers(member: Member) -> list[str]:
    """The tiers that are a node's alone, fastest first."""
    return [one.tier for one in member.tiers if not one.shared]


def _leading(
    tiers: Sequence[str], runs: Sequence[Sequence[int]], needs: Sequence[int]
) -> list[str]:
    """The tier of each leading chunk: that of its slowest part, each part where it is fastest."""
    held = np.stack([np.repeat(np.arange(len(one)) % 2 == 0, one) for one in runs])
    fastest = held.argmax(axis=0).reshape(-1, len(needs))
    count = _boundary(held.any(axis=0).reshape(-1, len(needs)), np.array(needs))
    left = np.arange(count, 0, -1)[:, np.newaxis]
    needed = (np.array(needs) == 0) | (left <= needs)
    slowest = np.where(needed, fastest[:count], -1).max(axis=1)
    return [tiers[place if place >= 0 else slowest[-1]] for place in slowest]


def _boundary(there: npt.NDArray[np.bool_], needs: npt.NDArray[np.int64]) -> int:
    """The most leading chunks behind which all is there that is needed.

    Args:
        there: (chunks, parts).
        needs: (parts,), how many of the last chunks; 0: every one.
    """
    numbers = np.arange(1, len(there) + 1)[:, np.newaxis]
    in_a_row = numbers - np.maximum.accumulate(np.where(there, 0, numbers), axis=0)
    wanted = np.where(needs == 0, numbers, np.minimum(needs, numbers))
    good = (in_a_row >= wanted).all(axis=1)
    return int(numbers[good].max(initial=0))


def holders(
    registry: Registry, objects: Sequence[tuple[bytes, int]], tier: str, members: Iterable[Member]
) -> list[Member]:
    """Those that hold any of these objects, by key and part, in a tier; one round trip.

    Raises:
        TierUnavailable: the registry cannot be used.
    """
    asked = list(members)
    ids = dict.fromkeys(id_of(key, part) for key, part in objects)
    with registry.call():
        answers = registry.client.batch(
            [("SMISMEMBER", registry.names.held(one.name, one.boot, tier), *ids) for one in asked]
        )
    return [
        one
        for one, held in zip(asked, answers, strict=True)
        if isinstance(held, list) and any(held)
    ]
