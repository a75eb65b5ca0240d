"""How a command waits for a job that it began."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.plain import echo

if TYPE_CHECKING:
    from kvstrata.control import Client
    from kvstrata.control.verbs.jobs import Job

LOOK_EVERY_S = 0.2


def follow(client: Client, job: Job, steps: str = "chunks") -> None:
    """Wait until a job has ended, and say what became of it; ctrl-C ends it.

    Exit status 1 if it did not come to its end, or something within it failed.
    """
    from kvstrata.units import approximate_size

    try:
        while job.state == "running":
            time.sleep(LOOK_EVERY_S)
            job = client.job(job.id)
    except KeyboardInterrupt:
        job = client.cancel(job.id)
    words = [f"{job.done} of {job.total} {steps}"]
    words += [f"{job.tokens} tokens"] if job.kind == "warm" else []
    words += [approximate_size(job.nbytes)] if job.nbytes else []
    echo(f"{job.state}: {', '.join(words)}" + (f"; {job.note}" if job.note else ""))
    for trouble in job.troubles:
        echo(f"kvstrata: {trouble}", err=True)
    if job.state != "done" or job.failed:
        raise typer.Exit(1)
