"""Background work whose death is heard of: tasks on the loop, and threads for what blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kvstrata.observe.counters import Counters

logger = logging.getLogger(__name__)

R = TypeVar("R")

NICE = 5
"""What may take its time yields to engines, but not so much that a thread which holds the
interpreter's lock for a moment keeps the node's loop waiting."""


class Tasks:
    """Tasks on the running loop; one that dies of a bug is logged and counted.

    Args:
        counters: the node's.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work``; ``what`` names it in the log."""
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait(self, timeout_s: float) -> None:
        """Give what runs this long to end by itself."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def cancel(self) -> None:
        """End all of it; repeatable."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            report_bug(self._counters, task.get_name(), error)


class Threads:
    """A few threads for calls that block; daemons, so one that hangs keeps no process alive.

    Args:
        count: how many, started as they are needed.
        name: of the threads.
        nice: by how much they yield to all others, as far as the system lets them; 0: not.
    """

    def __init__(self, count: int, name: str, nice: int = 0) -> None:
        self._count = count
        self._name = name
        self._nice = nice
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._idle = 0
        self._closed = False

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Queue a call; ``cancel`` on its future succeeds as long as it has not begun.

        Raises:
            RuntimeError: there is no thread, and none can be started; the call will not run.
        """
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
                return future
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._count:
                self._start_thread()
            self._calls.put((future, call))
        return future

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system's limit; those that run will do
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def close(self) -> None:
        """Cancel what has not begun and let the threads end; does not wait. Repeatable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while not self._calls.empty():
                if (item := self._calls.get()) is not None:
                    item[0].cancel()
            for _ in self._threads:
                self._calls.put(None)

    def _run(self) -> None:
        if self._nice:
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):  # of Linux alone is a thread's priority its own
                nice = os.getpriority(os.PRIO_PROCESS, thread) + self._nice
                os.setpriority(os.PRIO_PROCESS, thread, min(19, nice))
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            # What the call held (a buffer in the pool) must not stay until the next one comes.
            del item, future, call
            with self._lock:
                self._idle += 1


def report_bug(counters: Counters, what: str, error: BaseException) -> None:
    """Log with its trace, and count, an error that nobody foresaw."""
    counters.add("bugs_total", where=what)
    logger.error("%s died of a bug", what, exc_info=error)
