"""Writing behind, and forgetting."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, Hex32, Text, Told
from kvstrata.control.link import LONG_S
from kvstrata.control.owners import Whose, owners_of
from kvstrata.control.problems import Invalid
from kvstrata.control.prompts import Keys
from kvstrata.wire.client import NodeClient
from kvstrata.wire.operator import Operator

router = APIRouter(responses=PROBLEMS, tags=["act"])


Tiers = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)]


class Flushed(Told):
    """All of it is where it belongs."""

    status: str = Field(description="`ok`.")


class Clear(Whose):
    """What is to be forgotten: `everything`, or what fits all of the others that are given."""

    everything: Literal[True] | None = Field(
        None, description="`true` for all of it: nothing is cleared by what is left out."
    )
    keys: Keys | None = Field(None, description="Of the chunks, in hex.")
    namespace: Hex32 | None = Field(None, description="What is in this one.")
    before: float | None = Field(
        None,
        ge=1,
        lt=1e10,
        description="What was stored before, in seconds since 1970 by the clock that the node goes "
        "by (`now` of its status): in a fleet the registry's.",
        strict=False,
    )
    tiers: Tiers | None = Field(None, description="In these tiers only; left out: in all.")


class Cleared(Told):
    """It is forgotten, in all tiers that were named."""

    objects: int = Field(description="How many went.")


@router.post("/v1/flush", operation_id="flush")
async def flush(here: Here) -> Flushed:
    """Wait until what was stored so far is written to the slower tiers, or given up."""
    await here.link.ask(lambda node: node.flush(LONG_S), long=True)
    return Flushed(status="ok")


@router.post("/v1/clear", operation_id="clear")
async def clear(asked: Clear, here: Here) -> Cleared:
    """Forget chunks, exactly: nothing that was stored before it is served after it.

    A store that the node shares with others is cleared for all of them. What a request is being
    loaded from right now stays in memory until that load ends, and can no longer be found.
    """
    by = (asked.keys, asked.namespace, asked.before, asked.owner, asked.tenant)
    if (asked.everything is None) == all(one is None for one in by):
        raise Invalid(
            "everything",
            "expected everything, or else some of keys, namespace, before, owner and tenant",
        )
    keys = None if asked.keys is None else [bytes.fromhex(key) for key in asked.keys]

    def work(node: NodeClient) -> int:
        names = ["host", *node.hello.tiers]
        for number, tier in enumerate(asked.tiers or ()):
            if tier not in names:
                raise Invalid(f"tiers.{number}", f"no tier {tier!r}; there are {', '.join(names)}")
        operator = Operator(node, LONG_S)
        return sum(
            operator.clear(
                keys=keys,
                tiers=asked.tiers or (),
                owner=owner,
                namespace=bytes.fromhex(asked.namespace or ""),
                before_ns=int((asked.before or 0) * 1e9),
            )
            for owner in owners_of(node, asked) or [b""]
        )

    return Cleared(objects=await here.link.ask(work, long=True))
