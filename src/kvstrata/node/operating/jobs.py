"""Long work that an operator asked for: with a number, progress, and an end that can be had early.

A job runs on the node's loop and is asked to stop, never torn: a copy that has started comes to its
end. How many run and how many are remembered is bounded; all of them end with the node.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from kvstrata.errors import Busy, KVStrataError
from kvstrata.node.common.background import Tasks
from kvstrata.observe.counters import Counters
from kvstrata.wire import operating as o

T = TypeVar("T")

MAX_RUNNING = 16
MAX_REMEMBERED = 256
MAX_TROUBLES = 8
"""Of what went wrong within a job so many are told in words; all are counted."""
MAX_CHARS = 256
MAX_PAGE = 1000


class Stopped(Exception):
    """The job was asked to stop, and does."""


class Job:
    """One piece of long work, and how far it is.

    Args:
        id: its number.
        kind: what it does, in a word.
        about: to what, in a sentence for the operator.
        began: Unix seconds.
    """

    def __init__(self, id: int, kind: str, about: str, began: float) -> None:
        self.id = id
        self.kind = kind
        self.about = about[:MAX_CHARS]
        self.state = "running"
        self.total = self.done = self.nbytes = self.failed = 0
        self.note = ""
        self.began, self.ended = began, 0.0
        self._troubles: list[str] = []
        self._stop = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.state == "running"

    def trouble(self, what: str) -> None:
        """Note that something failed, while the rest goes on."""
        self.failed += 1
        if len(self._troubles) < MAX_TROUBLES:
            self._troubles.append(what[:MAX_CHARS])

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()

    def check(self) -> None:
        """Raise `Stopped` if it was asked to end."""
        if self._stop.is_set():
            raise Stopped

    async def wait(self, what: Awaitable[T], timeout_s: float | None = None) -> T:
        """Wait for something that may be left at any moment.

        Raises:
            Stopped: the job is asked to end.
            asyncio.TimeoutError: it took too long.
        """
        wanted, stop = asyncio.ensure_future(what), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait(
                {wanted, stop}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if wanted.done():
                return wanted.result()
            self.check()
            raise asyncio.TimeoutError
        finally:
            wanted.cancel()
            stop.cancel()

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while; raises `Stopped` as soon as it is asked to end."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except asyncio.TimeoutError:
            return
        self.check()

    def told(self) -> o.JobState:
        """As the protocol has it."""
        return o.JobState(
            self.id, self.kind, self.about, self.state, self.total, self.done, self.nbytes,
            self.failed, list(self._troubles), self.note[:MAX_CHARS], self.began, self.ended,
        )  # fmt: skip


Work = Callable[[Job], Coroutine[Any, Any, None]]


class JobTable:
    """The jobs that run, and the last of those that have ended.

    Args:
        counters: the node's.
        now: Unix seconds.
    """

    def __init__(self, counters: Counters, now: Callable[[], float] = time.time) -> None:
        self._counters = counters
        self._now = now
        self._tasks = Tasks(counters)
        self._jobs: dict[int, Job] = {}
        self._same: dict[bytes, Job] = {}  # by what was asked: those that run
        self._numbers = itertools.count(1)
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> list[Job]:
        """Those that have not ended."""
        return list(self._same.values())

    def get(self, id: int) -> Job | None:
        """A job by its number."""
        return self._jobs.get(id)

    def doing(self, same: bytes) -> Job | None:
        """The job that does this now."""
        return self._same.get(same)

    def start(
        self, kind: str, about: str, same: bytes, work: Work, most: int = MAX_RUNNING
    ) -> tuple[Job, bool]:
        """Begin work, unless it is being done already.

        Args:
            kind: of the job.
            about: in a sentence.
            same: what was asked, which is not done twice at once.
            work: does it.
            most: jobs of this kind that may run at once.
        Returns:
            The job, and whether it had been running already.
        Raises:
            Busy: as many run as may.
        """
        if (job := self._same.get(same)) is not None:
            return job, True
        if self._closed:
            raise Busy("the node is about to end")
        alike = sum(job.kind == kind for job in self._same.values())
        if len(self._same) >= MAX_RUNNING or alike >= most:
            count, what = (alike, kind) if alike >= most else (len(self._same), "")
            raise Busy(f"{count} {what} jobs run already; wait for one of them, or cancel it")
        job = Job(next(self._numbers), kind, about, self._now())
        self._jobs[job.id] = self._same[same] = job
        self._tasks.spawn(f"a {kind} job", self._run(job, same, work))
        return job, False

    def cancel(self, id: int) -> bool:
        """Ask a job to end; whether it was running."""
        job = self._jobs.get(id)
        if job is None or not job.running:
            return False
        job.stop()
        return True

    def page(self, after: int, most: int) -> tuple[list[Job], int]:
        """The jobs with the next higher numbers, and where the next page begins; 0: nowhere."""
        most = max(1, min(most, MAX_PAGE))
        some = list(itertools.islice((job for job in self._jobs.values() if job.id > after), most))
        rest = bool(some) and some[-1].id < next(reversed(self._jobs))
        return some, some[-1].id if rest else 0

    async def close(self, grace_s: float) -> None:
        """End all of them; what has not ended within ``grace_s`` is left where it is."""
        self._closed = True
        for job in self.running:
            job.stop()
        await self._tasks.wait(grace_s)
        await self._tasks.cancel()

    async def _run(self, job: Job, same: bytes, work: Work) -> None:
        state = "failed"
        try:
            await work(job)
            state = "done"
        except Stopped:
            state = "cancelled"
        except asyncio.CancelledError:
            state = "cancelled"
            raise
        except KVStrataError as error:
            job.note = str(error)
        except BaseException as error:
            job.note = f"a bug, see the node's log: {type(error).__name__}"
            raise
        finally:
            job.state, job.ended = state, self._now()
            del self._same[same]
            self._counters.add("jobs_total", kind=job.kind, state=state)
            self._forget_some()

    def _forget_some(self) -> None:
        ended = len(self._jobs) - len(self._same)
        for id in [job.id for job in self._jobs.values() if not job.running]:
            if ended <= MAX_REMEMBERED:
                return
            del self._jobs[id]
            ended -= 1
