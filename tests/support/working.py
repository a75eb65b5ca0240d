"""An operator of a node in this process: asks for jobs, and waits for them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from tests.support.nodes import until
from tests.support.real_nodes import KEYS, ME

from kvstrata.node.node import Node
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p


async def ask(node: Node, message: p.Request) -> Any:
    answer = node.handle(ME, message)
    return await answer if isinstance(answer, Awaitable) else answer


async def begun(node: Node, message: p.Request) -> int:
    started: o.Started = await ask(node, message)
    return started.job


async def state(node: Node, number: int) -> o.JobState:
    page: o.JobPage = await ask(node, o.Jobs(1, number - 1, 1))
    (job,) = page.jobs
    assert job.id == number
    return job


async def ended(node: Node, number: int) -> o.JobState:
    job = node.operations.jobs.get(number)
    assert job is not None
    await until(lambda: not job.running, 30.0)
    return job.told()


async def done(node: Node, message: p.Request) -> o.JobState:
    """A job that comes to its end without any trouble."""
    job = await ended(node, await begun(node, message))
    assert (job.state, job.failed, job.troubles) == ("done", 0, []), job
    assert job.done == job.total
    return job


def packed(keys: Sequence[bytes] = KEYS) -> bytes:
    return b"".join(keys)
