"""What the verbs share: the state behind them, and the form of their models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from kvstrata.config import Config
from kvstrata.control.access import MAY_WRITE
from kvstrata.control.jobs import Jobs
from kvstrata.control.link import Lane, NodeLink
from kvstrata.control.problems import Problem
from kvstrata.control.tokenizing import Tokenizers
from kvstrata.fleet.registry import Registry
from kvstrata.routing import CacheAware

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=["ab" * 32])]
"""A key or a namespace: 32 bytes in hex."""
Hex16 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""An owner: 16 bytes in hex."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(max_length=1024)]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "model": Problem,
        "description": "A problem (RFC 9457).",
        "content": {"application/problem+json": {}},
    }
}


class Asked(BaseModel):
    """A body that somebody sent: nothing in it is passed over, and nothing is taken for another."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Told(BaseModel):
    """What the API answers; a later release may add fields."""

    model_config = ConfigDict(extra="ignore")


@dataclass
class State:
    """Behind all verbs."""

    config: Config
    link: NodeLink
    jobs: Jobs = field(default_factory=Jobs)
    advice: CacheAware = field(default_factory=CacheAware)
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    tokenizing: Lane = field(default_factory=lambda: Lane("tokens", 2))
    registry: Registry | None = None
    fleet: Lane = field(default_factory=lambda: Lane("fleet", 2))


def _state(request: Request) -> State:
    state: State = request.app.state.kvstrata
    return state


def _may_write(request: Request) -> bool:
    return bool(request.scope[MAY_WRITE])


Here = Annotated[State, Depends(_state)]
MayWrite = Annotated[bool, Depends(_may_write)]
