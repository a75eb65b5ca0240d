"""The node itself: its tiers verified, its stores ended for good, its options changed."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field, JsonValue

from kvstrata.control.base import PROBLEMS, Asked, Here, Text, Told
from kvstrata.control.problems import Invalid
from kvstrata.control.verbs.jobs import Job, begun
from kvstrata.errors import KVStrataError
from kvstrata.wire import operating as o
from kvstrata.wire.client import NodeClient
from kvstrata.wire.operator import Operator

router = APIRouter(responses=PROBLEMS, tags=["act"])


class Scrub(Asked):
    """Which tier."""

    tier: Text = Field(description="One of the node's own; `host` is host memory.")


class Drain(Asked):
    """What is to come of it."""

    end: bool = Field(False, description="Whether the node ends once all is written.")


class Undrained(Told):
    """The node takes stores."""

    was_drained: bool = Field(description="Whether it did not.")


class Reload(Asked):
    """Another configuration."""

    config: dict[str, JsonValue] = Field(
        description="All of it, as a file has it: what is left out has its default."
    )


class Reloaded(Told):
    """The configuration counts."""

    changed: list[str] = Field(description="Options that changed, and count from now on.")
    engines: list[str] = Field(description="That changed, and count for engines that start.")


@router.post("/v1/scrub", operation_id="scrub", status_code=202)
async def scrub(asked: Scrub, here: Here) -> Job:
    """Verify all that a tier holds, now; what is corrupt is taken out of service; a job."""
    return await begun(here, lambda node: node.scrub(asked.tier))


@router.post("/v1/drain", operation_id="drain", status_code=202)
async def drain(asked: Drain, here: Here) -> Job:
    """Have the node take no new stores, and write behind what it has; a job.

    Engines go on reading. `end` ends the node then, as a signal does.
    """
    return await begun(here, lambda node: node.drain(end=asked.end))


@router.post("/v1/undrain", operation_id="undrain")
async def undrain(here: Here) -> Undrained:
    """Let the node take stores again."""
    return Undrained(was_drained=await here.link.ask(lambda node: Operator(node).undrain()))


@router.post("/v1/reload", operation_id="reload")
async def reload(asked: Reload, here: Here) -> Reloaded:
    """Hold the node to another configuration, as far as that may change while it runs.

    What needs a restart is refused by its name, and then nothing changes.
    """

    def work(node: NodeClient) -> o.Reloaded:
        try:
            return Operator(node).reload(asked.config)
        except KVStrataError as error:
            if type(error) is KVStrataError:  # what the node says of a configuration
                raise Invalid("config", str(error)) from error
            raise

    reloaded = await here.link.ask(work, long=True)
    return Reloaded(changed=reloaded.changed, engines=reloaded.engines)
