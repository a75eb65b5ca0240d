"""What was rejected and kept for the operator to look at: the last few files."""

from __future__ import annotations

import contextlib
import os
import threading

MAX_QUARANTINED = 16


class Quarantine:
    """The folder of rejected files; what lies there is no part of what the tier stores.

    Args:
        folder: where they are put, on the file system that they are on.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pruning = threading.Lock()

    def take(self, path: str) -> None:
        """Move a file here, or remove it where it cannot be moved: out of service, at least."""
        try:
            os.rename(path, os.path.join(self._folder, os.path.basename(path)))
        except OSError:
            os.unlink(path)

    def prune(self) -> None:
        """Remove all but the last `MAX_QUARANTINED`."""
        with self._pruning, contextlib.suppress(OSError):
            with os.scandir(self._folder) as entries:
                # A rename sets the change time; the other times are the object's.
                kept = sorted((entry.stat().st_ctime_ns, entry.path) for entry in entries)
            for _, path in kept[:-MAX_QUARANTINED]:
                os.unlink(path)
