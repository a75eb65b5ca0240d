"""What is held: all chunks in pages, and one object's header."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field, JsonValue

from kvstrata.control.base import PROBLEMS, Asked, Here, Hex32, Text, Told
from kvstrata.wire import operating as o
from kvstrata.wire.client import NodeClient
from kvstrata.wire.operator import TIMEOUT_S, Operator

router = APIRouter(responses=PROBLEMS, tags=["look"])
READS = ("/v1/inspect",)

TierName = Annotated[
    str,
    Query(max_length=64, description="Only what this one holds; empty: all of the node's own."),
]
After = Annotated[
    str,
    Query(
        pattern="^([0-9a-f]{64})?$",
        description="`next` of the page before; empty: from the beginning.",
    ),
]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]


class Chunk(Told):
    """One chunk; what the node does not know of it is empty or 0."""

    key: str
    tiers: dict[str, int] = Field(description="Bytes of it, by tier.")
    parent: str = Field(description="Key of the chunk before it.")
    start: int = Field(description="Position of its first token.")
    num_tokens: int
    namespace: str
    owner: str = Field(description="Whose it is: a digest of tenant and salt.")
    used: float = Field(description="When it was used last, in seconds since 1970.")


class Chunks(Told):
    """A page of them, in the order of their keys."""

    chunks: list[Chunk]
    next: str = Field(description="`after` of the next page; empty: this was the last one.")


class Inspect(Asked):
    """Which object."""

    tier: Text = Field(description="Where it lies; `host` is host memory.")
    key: Hex32 = Field(description="Of its chunk.")
    part: int = Field(0, ge=0, lt=1 << 32, description="Which of the chunk's objects: its rank.")
    namespace: Hex32 | None = Field(None, description="Of the chunk; needed in a shared tier.")
    orders: Annotated[list[Text], Field(fail_fast=True)] = Field(
        [], max_length=16, description="Byte orders that it may have; needed in a shared tier."
    )


class Inspected(Told):
    """One object, verified."""

    nbytes: int = Field(description="As it lies there; 0: it is not there.")
    problem: str = Field(description="What is wrong with it; empty: it is whole.")
    header: dict[str, JsonValue] = Field(description="Every field of the stored format.")


@router.get("/v1/chunks", operation_id="chunks")
async def chunks(here: Here, tier: TierName = "", after: After = "", limit: Limit = 100) -> Chunks:
    """Everything that the node's own tiers hold, in pages.

    A chunk that stays is told once, whatever comes and goes meanwhile.
    """
    listed: o.Listed = await here.link.ask(
        lambda node: node.begin(o.List, o.Listed, tier, bytes.fromhex(after), limit).wait(TIMEOUT_S)
    )
    return Chunks(
        chunks=[
            Chunk(
                key=one.key.hex(),
                tiers=one.tiers,
                parent=one.parent.hex(),
                start=one.start,
                num_tokens=one.num_tokens,
                namespace=one.namespace.hex(),
                owner=one.owner.hex(),
                used=one.used,
            )
            for one in listed.chunks
        ],
        next=listed.next.hex(),
    )


@router.post("/v1/inspect", operation_id="inspect")
async def inspect(asked: Inspect, here: Here) -> Inspected:
    """Read one object where it lies; say what it is, and whether it is whole. Changes nothing."""

    def work(node: NodeClient) -> o.Inspected:
        namespace = bytes.fromhex(asked.namespace or "")
        key = bytes.fromhex(asked.key)
        return Operator(node).inspect(asked.tier, key, asked.part, asked.orders, namespace)

    found = await here.link.ask(work, long=True)
    header: dict[str, Any] = found.header
    return Inspected(nbytes=found.nbytes, problem=found.problem, header=header)
