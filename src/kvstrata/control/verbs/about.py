"""Whether the API and its node are there, which they are, and everything the node tells."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import ConfigDict, Field

import kvstrata
from kvstrata.control.base import PROBLEMS, Here, Told
from kvstrata.wire.client import NodeClient
from kvstrata.wire.protocol import PROTOCOL_VERSION

router = APIRouter(responses=PROBLEMS, tags=["about"])


class Health(Told):
    """The API answers."""

    status: str = Field(description="`ok`.")


class Ready(Told):
    """The node answers."""

    status: str = Field(description="`ok`.")
    tiers: dict[str, str] = Field(description="Each tier's state in a word, by its name.")


class Version(Told):
    """Who answers."""

    release: str = Field(description="Of KVStrata, of the API's process.")
    protocol: int = Field(description="Version of the node's protocol.")
    node_release: str = Field(description="Of KVStrata, of the node.")
    node_pid: int = Field(description="The node's process.")


class HostMemory(Told):
    """The pool."""

    model_config = ConfigDict(extra="allow")

    capacity_bytes: int
    allocated_bytes: int
    num_chunks: int
    num_objects: int


class Leases(Told):
    """What is held still."""

    model_config = ConfigDict(extra="allow")

    count: int
    bytes: int


class Tier(Told):
    """One slower tier; a shared one does not know what it holds."""

    model_config = ConfigDict(extra="allow")

    name: str
    state: str
    codec: str


class Status(Told):
    """Everything that the node tells, as `kvstrata status --json` prints it."""

    model_config = ConfigDict(extra="allow")

    release: str
    pid: int
    uptime_s: float
    host: HostMemory
    leases: Leases
    tiers: list[Tier]
    counters: dict[str, float]


@router.get("/v1/health", operation_id="health")
async def health() -> Health:
    """Whether the API's process lives. Needs no token, and no node."""
    return Health(status="ok")


@router.get("/v1/ready", operation_id="ready")
async def ready(here: Here) -> Ready:
    """Whether the node can be asked: 503 while none answers. Needs no token."""
    state = await here.link.ask(NodeClient.status)
    tiers = {tier["name"]: tier["state"].partition(":")[0] for tier in state["tiers"]}
    return Ready(status="ok", tiers={"host": "ok", **tiers})


@router.get("/v1/version", operation_id="version")
async def version(here: Here) -> Version:
    """Releases of the API and of its node."""
    hello = await here.link.ask(lambda node: node.hello)
    return Version(
        release=kvstrata.__version__,
        protocol=PROTOCOL_VERSION,
        node_release=hello.release,
        node_pid=hello.pid,
    )


@router.get("/v1/status", operation_id="status")
async def status(here: Here) -> Status:
    """Memory, tiers, leases, counters and the last requests of the node."""
    state: dict[str, Any] = await here.link.ask(NodeClient.status)
    return Status.model_validate(state)
