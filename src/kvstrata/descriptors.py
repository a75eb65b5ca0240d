"""How many files and connections a process may have open at a time."""

from __future__ import annotations

import contextlib
import resource


def allow(wanted: int) -> None:
    """Raise the soft limit of descriptors to what the hard one allows of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
