"""What became of the last requests, in pages."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field

from kvstrata.control.base import PROBLEMS, Here, Told
from kvstrata.control.link import ANSWER_S
from kvstrata.wire import protocol as p

router = APIRouter(responses=PROBLEMS, tags=["look"])

Limit = Annotated[int, Query(ge=1, le=p.MAX_PAGE, description="How many at most.")]
Before = Annotated[
    int, Query(ge=0, lt=1 << 63, description="`next` of the page before; 0: from the latest on.")
]


class Record(Told):
    """One request as its engine tells it; further fields depend on what became of it."""

    model_config = ConfigDict(extra="allow")

    number: int = Field(description="Counted since the node started.")
    request: str = Field("", description="The engine's id of it.")
    outcome: str = ""


class Records(Told):
    """A page of them, the latest first."""

    records: list[Record]
    next: int = Field(description="`before` of the next page; 0: this was the last one.")


@router.get("/v1/requests", operation_id="requests")
async def requests(here: Here, before: Before = 0, limit: Limit = 100) -> Records:
    """The records of the last 1,024 requests."""
    page: p.RecordPage = await here.link.ask(
        lambda node: node.begin(p.Records, p.RecordPage, before, limit).wait(ANSWER_S)
    )
    shown: list[dict[str, Any]] = [
        {**one, "request": str(one.get("request", "")), "outcome": str(one.get("outcome", ""))}
        for one in page.records
    ]
    return Records(records=[Record.model_validate(one) for one in shown], next=page.next)
