"""What a shared folder needs beside obstore: a lock for writes on a condition, reads without a copy
of their own, and tidiness."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from kvstrata.errors import ReadOnly, TierUnavailable

POLL_S = 0.01

# As obstore's writer names what it has not yet renamed.
_UNFINISHED = re.compile(r".*#[0-9]+")


@contextlib.contextmanager
def locked(folder: Path, timeout_s: float) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that has it.

    Raises:
        ReadOnly: this user may not write there.
        TierUnavailable: it could not be had in this time, or the file system knows no locks.
    """
    deadline = time.monotonic() + timeout_s
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        kind = ReadOnly if refused else TierUnavailable
        raise kind(f"{folder / 'lock'}: {error.strerror}") from error
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    raise TierUnavailable(
                        f"{folder / 'lock'} cannot be locked: {error.strerror}; mount the file "
                        "system with locks (Lustre: -o flock; NFS: without -o nolock)"
                    ) from error
            if time.monotonic() > deadline:
                raise TierUnavailable(f"{folder / 'lock'} is held by somebody for {timeout_s:g} s")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def read_file(path: Path, into: memoryview) -> int:
    """Read a file whole into a buffer that is large enough for it; its size, or -1 if it was cut.

    A file that is larger is not read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size <= len(into):
            if not (count := os.preadv(fd, [into[at:size]], at)):
                return -1
            at += count
        return size
    finally:
        os.close(fd)


def unfinished(folder: Path, before_s: float) -> Iterator[list[Path]]:
    """Files whose writer died, by folder: begun before that time (Unix seconds)."""
    for root, _, names in os.walk(folder):
        found = []
        for name in names:
            if _UNFINISHED.fullmatch(name):
                path = Path(root, name)
                with contextlib.suppress(OSError):  # it has just been finished
                    if path.stat().st_mtime < before_s:
                        found.append(path)
        yield found
