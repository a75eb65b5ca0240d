"""Which cores an on-demand node may use: those that its engine's operator gave the engine.

An engine binds threads of its own to single cores, and what such a thread starts inherits that. The
operator's will, say a `taskset`, shows in the engine's process group: the widest of its threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def given_cores() -> set[int]:
    """Cores of all threads of this process and its ancestors, within its process group."""
    cores = os.sched_getaffinity(0)
    for pid in _ancestors():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _ancestors() -> Iterator[int]:
    pid, group = os.getppid(), os.getpgrp()
    with contextlib.suppress(OSError, ValueError):
        while pid > 0 and os.getpgid(pid) == group:
            yield pid
            # The name in parentheses may hold anything; state and parent follow it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
