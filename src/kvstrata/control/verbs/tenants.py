"""What tenants may have: pins of what matters to them, quotas of bytes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, Hex16, Text, Told
from kvstrata.control.owners import Whose, named_owners
from kvstrata.control.prompts import Prompt, chunks_of
from kvstrata.wire import operating as o
from kvstrata.wire.client import NodeClient
from kvstrata.wire.operator import TIMEOUT_S, Operator

router = APIRouter(responses=PROBLEMS, tags=["act"])

MAX_TTL_S = 10 * 365 * 86400.0
Name = Annotated[str, Field(min_length=1, max_length=128)]
After = Annotated[
    str,
    Query(
        pattern="^([0-9a-f]{2}){0,512}$",
        description="`next` of the page before; empty: from the beginning.",
    ),
]
Limit = Annotated[int, Query(ge=1, le=256, description="How many at most.")]


class Pin(Prompt):
    """Whose chunks are kept, under which name, for how long."""

    name: Name = Field(description="By which the pin is ended, or renewed.")
    ttl_s: float = Field(gt=0, le=MAX_TTL_S, description="For how long, in seconds.", strict=False)


class Pinned(Told):
    """What is kept."""

    name: str
    owner: Hex16 = Field(description="Whose pin it is, and on whose quota.")
    chunks: int = Field(description="Of the prompt.")
    kept: int = Field(description="How many of them are kept: the head, as far as the quotas go.")
    tiers: dict[str, int] = Field(description="How many each of the node's own tiers keeps.")
    notes: dict[str, str] = Field(description="Why other tiers keep none.")


class Unpin(Whose):
    """Which pin ends."""

    name: Name = Field(description="Its name.")


class Unpinned(Told):
    """It has ended."""

    chunks: int = Field(description="How many it had; 0: there was none.")


class PinState(Told):
    """One pin."""

    name: str
    owner: Hex16
    chunks: int
    kept: int = Field(description="How many of them are kept now.")
    until: float = Field(description="Seconds since 1970.")


class Pins(Told):
    """A page of them, by owner and name."""

    pins: list[PinState]
    next: str = Field(description="`after` of the next page; empty: this was the last one.")


class Quota(Whose):
    """How much whose chunks may take in which tier."""

    tier: Text = Field(description="One of the node's own; `host` is host memory.")
    nbytes: int | None = Field(ge=0, lt=1 << 62, description="Bytes; null: no bound.")


class Held(Told):
    """The quota counts."""

    owner: Hex16 = Field(description="By the secret that stores use.")
    nbytes: int = Field(description="What is there now of the owner, by each of the secrets.")


@router.post("/v1/pin", operation_id="pin")
async def pin(asked: Pin, here: Here) -> Pinned:
    """Keep a prompt's chunks in the node's own tiers, for a time and within the quota of pins.

    It is the pin of the model's tenant, and of the salt. The same again renews it. Pins outlive the
    node; a clear ends what it clears.
    """
    chunks = await chunks_of(here, asked)

    def work(node: NodeClient) -> o.Pinned:
        return Operator(node).pin(chunks.keys[0], chunks.owner, asked.name, asked.ttl_s)

    pinned = await here.link.ask(work, long=True)
    return Pinned(
        name=asked.name,
        owner=chunks.owner.hex(),
        chunks=pinned.num_chunks,
        kept=pinned.num_kept,
        tiers=pinned.tiers,
        notes=pinned.notes,
    )


@router.post("/v1/unpin", operation_id="unpin")
async def unpin(asked: Unpin, here: Here) -> Unpinned:
    """End a pin, which the tenant may have given with a salt.

    By each of the deployment's secrets: a pin of before the present one ends, too.
    """

    def work(node: NodeClient) -> int:
        operator = Operator(node)
        return sum(operator.unpin(owner, asked.name) for owner in named_owners(node, asked))

    return Unpinned(chunks=await here.link.ask(work))


@router.get("/v1/pins", operation_id="pins")
async def pins(here: Here, after: After = "", limit: Limit = 100) -> Pins:
    """All pins."""
    page: o.PinPage = await here.link.ask(
        lambda node: node.begin(o.Pins, o.PinPage, bytes.fromhex(after), limit).wait(TIMEOUT_S)
    )
    return Pins(
        pins=[
            PinState(
                name=one.name,
                owner=one.owner.hex(),
                chunks=one.num_chunks,
                kept=one.num_kept,
                until=one.until_s,
            )
            for one in page.pins
        ],
        next=page.after.hex(),
    )


@router.post("/v1/quota", operation_id="quota")
async def quota(asked: Quota, here: Here) -> Held:
    """Let a tenant have so many bytes in one of the node's own tiers.

    Beyond that its own chunks go first, never another's; what is too much now goes at once.
    While the deployment knows two secrets, the tenant may have so many by each of them.
    """

    def work(node: NodeClient) -> list[tuple[bytes, int]]:
        operator = Operator(node)
        return [
            (owner, operator.quota(owner, asked.tier, asked.nbytes))
            for owner in named_owners(node, asked)
        ]

    held = await here.link.ask(work, long=True)
    return Held(owner=held[0][0].hex(), nbytes=sum(nbytes for _, nbytes in held))
