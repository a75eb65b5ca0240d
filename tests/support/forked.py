"""Child processes that need an engine: forked off one process that has imported it already.

An import of an engine takes seven seconds, a fork none. What must be a process of its own in every
respect, with other hash seeds too, is started ``fresh``.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


class Forked:
    """A function that runs in a process of its own; used as a `subprocess.Popen` is.

    Args:
        function: importable by name; the process ends when it returns.
        arguments: may hold sockets.
        log: file for everything the child prints.
        environment: the child's, whole.
        server: the process to fork it off, from `fork_server`; None for a new interpreter.
    """

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        log: Path,
        environment: Mapping[str, str],
        server: ForkServerContext | None,
    ) -> None:
        context = server or multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=_run, args=(function, arguments, str(log), dict(environment))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, by a signal if negative; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return its `returncode` once it has ended; `subprocess.TimeoutExpired` if it does not."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        """Send it SIGKILL."""
        self._process.kill()


@functools.cache
def fork_server(preload: str, surroundings: Callable[[], Mapping[str, str]]) -> ForkServerContext:
    """The process that has imported an engine; it ends with this one, which has one of them.

    Args:
        preload: the module that imports what every child would; it may start no thread.
        surroundings: the environment in which it does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    own = dict(os.environ)
    os.environ.update(surroundings())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(own)
    return context


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    log: str,
    environment: dict[str, str],
) -> None:
    """The child's beginning and end."""
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        function(*arguments)
    finally:
        # A process of `multiprocessing` leaves these out, and engines end their processes in them.
        atexit._run_exitfuncs()
