"""Long work of the node and of the API: how far it is, and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, State, Told
from kvstrata.control.jobs import PREFIX, Work
from kvstrata.control.problems import NoSuch
from kvstrata.errors import UsageError
from kvstrata.wire.client import NodeClient
from kvstrata.wire.operating import JobState
from kvstrata.wire.operator import Operator

router = APIRouter(responses=PROBLEMS, tags=["jobs"])

OF_NODE = "node-"

Id = Annotated[str, Path(max_length=64, description="Of the job.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]
After = Annotated[
    str, Query(max_length=64, description="`next` of the page before; empty: from the latest on.")
]


class Job(Told):
    """Long work under way, or ended."""

    id: str
    kind: str = Field(description="The verb.")
    about: str = Field(description="What it is done to, in words.")
    state: str = Field(description="`running`, `done`, `failed` or `cancelled`.")
    done: int = Field(description="Steps that are over, those that failed included.")
    total: int = Field(description="All steps, as far as they are known.")
    failed: int = Field(description="Steps that failed; a job that is done may have some.")
    nbytes: int = Field(description="Bytes that were moved or read.")
    tokens: int = Field(description="Of a `warm`: prompt tokens that the engine reports.")
    troubles: list[str] = Field(description="Why, of the first steps that failed.")
    note: str = Field(description="What else is to be said of it.")
    began_at: float = Field(description="Seconds since 1970.")
    ended_at: float | None = Field(description="The same; null while it runs.")


class Jobs(Told):
    """A page of them, the latest first."""

    jobs: list[Job]
    next: str = Field(description="`after` of the next page; empty: this was the last one.")


@router.get("/v1/jobs", operation_id="jobs")
async def jobs(here: Here, after: After = "", limit: Limit = 100) -> Jobs:
    """The jobs that run and the last ones that ended, of the node and of the API.

    A job is gone when the process that does it ends: the node, or the API for a `warm`.
    """
    of_nodes = await here.link.ask(lambda node: [of_node(one) for one in Operator(node).jobs()])
    found = [*of_nodes, *map(of_api, here.jobs.latest())]
    found.sort(key=lambda job: job.began_at, reverse=True)
    ids = [job.id for job in found]
    if after and after not in ids:
        raise NoSuch(f"there is no job {after}")
    start = ids.index(after) + 1 if after else 0
    page = found[start : start + limit]
    more = start + limit < len(found)
    return Jobs(jobs=page, next=page[-1].id if more else "")


@router.get("/v1/jobs/{id}", operation_id="job")
async def job(id: Id, here: Here) -> Job:
    """One job."""
    if id.startswith(PREFIX):
        return of_api(here.jobs.get(id))
    number = _number(id)
    return await here.link.ask(lambda node: _of_number(node, number))


@router.post("/v1/jobs/{id}/cancel", operation_id="cancel")
async def cancel(id: Id, here: Here) -> Job:
    """End a job; what it has done stays done. One that has ended stays as it is.

    A job of the node first brings to its end what it has begun.
    """
    if id.startswith(PREFIX):
        return of_api(await here.jobs.cancel(id))
    number = _number(id)

    def work(node: NodeClient) -> Job:
        _of_number(node, number)
        Operator(node).cancel(number)
        return _of_number(node, number)

    return await here.link.ask(work)


async def begun(here: State, work: Callable[[Operator], int]) -> Job:
    """Have the node begin a job, and tell it."""

    def begin(node: NodeClient) -> Job:
        operator = Operator(node)
        return of_node(operator.job(work(operator)))

    return await here.link.ask(begin)


def of_api(job: Work) -> Job:
    """One of the API's own."""
    return Job(
        id=job.id, kind=job.kind, about=job.about, state=job.state, done=job.done,
        total=job.total, failed=job.failed, nbytes=0, tokens=job.tokens, troubles=job.troubles,
        note="", began_at=job.began_at, ended_at=job.ended_at,
    )  # fmt: skip


def of_node(job: JobState) -> Job:
    """One of the node's."""
    return Job(
        id=f"{OF_NODE}{job.id}", kind=job.kind, about=job.about, state=job.state, done=job.done,
        total=job.total, failed=job.failed, nbytes=job.nbytes, tokens=0, troubles=job.troubles,
        note=job.note, began_at=job.began, ended_at=job.ended or None,
    )  # fmt: skip


def _number(id: str) -> int:
    digits = id.removeprefix(OF_NODE)
    if not id.startswith(OF_NODE) or not (digits.isascii() and digits.isdigit()):
        raise NoSuch(f"there is no job {id}")
    number = int(digits)
    if not 0 < number < 1 << 62:
        raise NoSuch(f"there is no job {id}")
    return number


def _of_number(node: NodeClient, number: int) -> Job:
    try:
        return of_node(Operator(node).job(number))
    except UsageError as error:
        raise NoSuch(str(error)) from error
