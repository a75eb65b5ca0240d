"""Child processes that need vLLM: forked off one process that has imported it already.

An import of vLLM takes seven seconds, a fork none. What must be a process of its own in every
respect, with other hash seeds too, is started ``fresh``.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from kvstrata.testing.engine import ENGINE_ENVIRONMENT


class Child:
    """A function that runs in a process of its own; used as a `subprocess.Popen` is.

    Args:
        function: importable by name; the process ends when it returns.
        arguments: may hold sockets.
        log: file for everything the child prints.
        environment: the child's, whole.
        fresh: a new interpreter, which imports vLLM itself.
    """

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        log: Path,
        environment: Mapping[str, str],
        fresh: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn") if fresh else _fork_server()
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


ONE_THREAD = {
    # Two that share busy cores spend their time waiting for one another. With a connector vLLM
    # leaves one core more unused, and another number of threads is another rounding: answers are
    # only comparable under one number.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def surroundings(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment: this process's without KVStrata's options, and one thread."""
    kept = {"KVSTRATA_MODEL_CACHE"}
    own = {k: v for k, v in os.environ.items() if not k.startswith("KVSTRATA_") or k in kept}
    return {
        **own,
        **ENGINE_ENVIRONMENT,
        **ONE_THREAD,
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        **(more or {}),
    }


@functools.cache
def _fork_server() -> ForkServerContext:
    """The process that has imported vLLM; it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.preload"])
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
        # A process of `multiprocessing` leaves these out, and vLLM ends its own processes in them.
        atexit._run_exitfuncs()
