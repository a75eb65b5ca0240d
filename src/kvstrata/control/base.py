"""What the verbs share: the state behind them, and the form of their models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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
MAX_TOKENS = 1 << 21
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]
"""Of a list one error is told, not one for each of millions of elements."""
Text = Annotated[str, Field(max_length=1024)]

MAX_FIELDS = 64
"""That a body may have; each unknown one is an error, so there are no more."""

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

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MAX_FIELDS:
            raise ValueError(f"{len(given)} fields; {MAX_FIELDS} at most")
        return given


class Told(BaseModel):
    """What the API answers; a later release may add fields."""

    model_config = ConfigDict(extra="ignore")


def at_most(most: int) -> BeforeValidator:
    """Look at the entries of a mapping only if there are no more than this."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > most:
            raise ValueError(f"{len(given)} entries; {most} at most")
        return given

    return BeforeValidator(check)


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
