"""Long work of the API's own process: it has a number, says how far it is, and can be ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from kvstrata.control.problems import NoSuch
from kvstrata.errors import Busy, KVStrataError

logger = logging.getLogger(__name__)

PREFIX = "api-"
MAX_RUNNING = 8
MAX_REMEMBERED = 128
MAX_TROUBLES = 16

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"


@dataclass
class Work:
    """One job.

    Args:
        id: ``api-`` and a number.
        kind: the verb.
        total: how many steps it has.
        asked: what was asked for, so that a repetition is noticed.
        about: the same in words.
    """

    id: str
    kind: str
    total: int
    asked: object
    about: str = ""
    began_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    state: str = RUNNING
    done: int = 0
    failed: int = 0
    tokens: int = 0
    troubles: list[str] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def trouble(self, words: str) -> None:
        """Count a step that failed; the first reasons are kept."""
        self.failed += 1
        if len(self.troubles) < MAX_TROUBLES:
            self.troubles.append(words)


class Jobs:
    """All that run, and the last ones that have ended. Lives on the API's loop."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Work] = OrderedDict()
        self._numbers = itertools.count(1)

    def begin(
        self,
        kind: str,
        total: int,
        asked: object,
        work: Callable[[Work], Coroutine[Any, Any, None]],
        about: str = "",
    ) -> Work:
        """Start one; the one that already runs where exactly this is being done.

        Raises:
            Busy: too many run.
        """
        running = [job for job in self._jobs.values() if job.state == RUNNING]
        for job in running:
            if (job.kind, job.asked) == (kind, asked):
                return job
        if len(running) >= MAX_RUNNING:
            raise Busy(f"{MAX_RUNNING} jobs run; wait for one, or cancel one")
        job = Work(f"{PREFIX}{next(self._numbers)}", kind, total, asked, about)
        self._jobs[job.id] = job
        for old in [one.id for one in self._jobs.values() if one.state != RUNNING]:
            if len(self._jobs) <= MAX_REMEMBERED:
                break
            del self._jobs[old]
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    def get(self, id: str) -> Work:
        """One of them; raises `NoSuch`."""
        if id not in self._jobs:
            raise NoSuch(f"there is no job {id}")
        return self._jobs[id]

    def latest(self) -> list[Work]:
        """All, the latest first."""
        return list(reversed(self._jobs.values()))

    async def cancel(self, id: str) -> Work:
        """End one and wait for its end; one that has ended stays as it is."""
        job = self.get(id)
        if job.task is not None and job.state == RUNNING:
            job.task.cancel()
            await asyncio.wait({job.task})
            if job.state == RUNNING:  # it had not begun
                job.state, job.ended_at = CANCELLED, time.time()
        return job

    async def close(self) -> None:
        """End all of them."""
        for job in self.latest():
            await self.cancel(job.id)

    async def _run(self, job: Work, work: Callable[[Work], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(job)
            job.state = FAILED if job.failed else DONE
        except asyncio.CancelledError:
            job.state = CANCELLED
        except KVStrataError as error:
            job.trouble(str(error))
            job.state = FAILED
        except Exception as error:
            job.trouble(f"a mistake of ours: {error!r}")
            job.state = FAILED
            logger.exception("the job %s failed", job.id)
        finally:
            job.ended_at = time.time()
