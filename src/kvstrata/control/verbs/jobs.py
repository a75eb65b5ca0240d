"""Long work: how far it is, and its end."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, Told
from kvstrata.control.jobs import MAX_REMEMBERED, Work

router = APIRouter(responses=PROBLEMS, tags=["jobs"])

Id = Annotated[str, Path(max_length=64, description="Of the job.")]
Limit = Annotated[int, Query(ge=1, le=MAX_REMEMBERED, description="How many at most.")]
After = Annotated[
    str, Query(max_length=64, description="`next` of the page before; empty: from the latest on.")
]


class Job(Told):
    """Long work under way, or ended."""

    id: str
    kind: str = Field(description="The verb.")
    state: str = Field(description="`running`, `done`, `failed` or `cancelled`.")
    done: int = Field(description="Steps that are over, those that failed included.")
    total: int = Field(description="All steps.")
    failed: int = Field(description="Steps that failed.")
    tokens: int = Field(description="Of a `warm`: prompt tokens that the engine reports.")
    troubles: list[str] = Field(description="Why, of the first ones that failed.")
    began_at: float = Field(description="Seconds since 1970.")
    ended_at: float | None = Field(description="The same; null while it runs.")


class Jobs(Told):
    """A page of them, the latest first."""

    jobs: list[Job]
    next: str = Field(description="`after` of the next page; empty: this was the last one.")


def shown(job: Work) -> Job:
    """As the API tells it."""
    return Job.model_validate(job, from_attributes=True)


@router.get("/v1/jobs", operation_id="jobs")
async def jobs(here: Here, after: After = "", limit: Limit = 100) -> Jobs:
    """The jobs that run and the last ones that ended; they are gone when the API ends."""
    found = here.jobs.latest()
    ids = [job.id for job in found]
    start = ids.index(here.jobs.get(after).id) + 1 if after else 0
    page = found[start : start + limit]
    more = start + limit < len(found)
    return Jobs(jobs=[shown(job) for job in page], next=page[-1].id if more else "")


@router.get("/v1/jobs/{id}", operation_id="job")
async def job(id: Id, here: Here) -> Job:
    """One job."""
    return shown(here.jobs.get(id))


@router.post("/v1/jobs/{id}/cancel", operation_id="cancel")
async def cancel(id: Id, here: Here) -> Job:
    """End a job; what it has done stays done. One that has ended stays as it is."""
    return shown(await here.jobs.cancel(id))
