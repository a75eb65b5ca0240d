"""Child processes that need vLLM, and what they have in their environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.forked import Forked, fork_server

from kvstrata.testing.engine import ENGINE_ENVIRONMENT


class Child(Forked):
    """One of them, forked off a process that has imported vLLM, unless it is ``fresh``."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        log: Path,
        environment: Mapping[str, str],
        fresh: bool = False,
    ) -> None:
        server = None if fresh else fork_server("tests.engine.preload", surroundings)
        super().__init__(function, arguments, log, environment, server)


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
