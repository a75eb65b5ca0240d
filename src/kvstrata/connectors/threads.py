"""Which cores the connector's own threads use, and how nice they are."""

from __future__ import annotations

import logging
import os
import threading

from kvstrata.cores import given_cores

logger = logging.getLogger(__name__)

#: how much nicer than the engine a store is: a tenth of a core that is wanted, not nothing, for it
#: may hold the GIL, or blocks that a step waits for
STORE_NICENESS = 10


def yield_to_the_engine() -> None:
    """Nobody waits for what is stored."""
    use_given_cores()
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + STORE_NICENESS))


def use_given_cores() -> None:
    """vLLM binds the worker's main thread to one core, and threads inherit that."""
    try:
        os.sched_setaffinity(threading.get_native_id(), given_cores())
    except OSError:
        logger.debug("KVStrata: a copy thread keeps to the engine's core")
