"""The fleet that the node is of, as its registry knows it."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import ConfigDict, Field

from kvstrata.control.base import PROBLEMS, Here, Told

router = APIRouter(responses=PROBLEMS, tags=["look"])


class Holding(Told):
    """What one tier of a node holds; of a shared one its name alone is known."""

    model_config = ConfigDict(from_attributes=True)

    tier: str
    shared: bool
    capacity_bytes: int
    used_bytes: int
    num_chunks: int


class Member(Told):
    """A node of the fleet."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    state: str = Field(description="`joining`, `member` or `draining`.")
    release: str = Field(description="Of KVStrata.")
    peers: str = Field(description="Where other nodes find it; empty: nowhere.")
    api: str = Field(description="Where its HTTP API is; empty: nowhere.")
    clock_offset_s: float = Field(description="By how much its clock is ahead of the registry's.")
    tiers: list[Holding]


class Fleet(Told):
    """Those that are registered now."""

    members: list[Member] = Field(description="By their names; empty where there is no registry.")


@router.get("/v1/fleet", operation_id="fleet")
async def fleet(here: Here) -> Fleet:
    """The nodes that share a registry with this one (`[fleet]`), and what each holds."""
    if here.registry is None:
        return Fleet(members=[])
    found = await here.fleet.run(here.registry.members)
    return Fleet(members=[Member.model_validate(one) for one in found])
