"""Writing behind, and forgetting."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Asked, Here, Told
from kvstrata.control.link import LONG_S
from kvstrata.control.problems import Invalid
from kvstrata.control.prompts import Keys
from kvstrata.wire.client import NodeClient

router = APIRouter(responses=PROBLEMS, tags=["act"])


class Flushed(Told):
    """All of it is where it belongs."""

    status: str = Field(description="`ok`.")


class Clear(Asked):
    """What is to be forgotten: `everything`, or the chunks of `keys`."""

    everything: Literal[True] | None = Field(
        None, description="`true` for all of it: nothing is cleared by what is left out."
    )
    keys: Keys | None = Field(None, description="Of the chunks, in hex.")
    tiers: list[str] | None = Field(
        None, description="In these tiers only; left out: in all.", min_length=1, max_length=64
    )


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
    if (asked.everything is None) == (asked.keys is None):
        raise Invalid("everything", "expected exactly one of everything and keys")
    keys = None if asked.keys is None else [bytes.fromhex(key) for key in asked.keys]

    def work(node: NodeClient) -> int:
        names = ["host", *node.hello.tiers]
        for number, tier in enumerate(asked.tiers or ()):
            if tier not in names:
                raise Invalid(f"tiers.{number}", f"no tier {tier!r}; there are {', '.join(names)}")
        return node.clear(keys, asked.tiers or (), LONG_S)

    return Cleared(objects=await here.link.ask(work, long=True))
