"""Which cores an engine's node and copies may use: those that its operator gave the engine.

An engine binds threads of its own to single cores, and what such a thread starts inherits that. The
operator's will, say a `taskset`, shows in the widest of the engine's threads, and of those of the
processes that it comes from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def given_cores() -> set[int]:
    """Cores of all threads of this process and of those it comes from, as far as they are ours."""
    cores = os.sched_getaffinity(0)
    for pid in _processes():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                cores |= os.sched_getaffinity(int(thread.name))
    return cores


def _processes() -> Iterator[int]:
    """This one and those above it, while the program is the same: beyond is a shell, say."""
    program, pid = os.readlink("/proc/self/exe"), os.getpid()
    with contextlib.suppress(OSError, ValueError):
        while os.readlink(f"/proc/{pid}/exe") == program:
            yield pid
            # The name in parentheses may hold anything; state and parent follow it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
