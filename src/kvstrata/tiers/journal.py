"""A small journal beside a tier's objects: lines that outlive the process, each with a checksum.

What is appended is there after a crash, or it is not there at all: a torn end is dropped. A line
that is damaged elsewhere is reported, since nobody knows what it said.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence

import xxhash

from kvstrata.errors import ReadOnly, TierUnavailable

SUM_CHARS = 16
MAX_JOURNAL_BYTES = 64 << 20
"""That is read again at a start, and so the most that is ever written."""


class Journal:
    """Lines in memory, for a tier whose bytes end with the process. Thread-safe; verbs block."""

    damaged = False
    """Whether a line was lost that had once been written."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._lock = threading.Lock()
        self.nbytes = 0
        """Of all lines, as a file has them."""

    def lines(self) -> list[bytes]:
        """All that was appended since it was replaced, oldest first."""
        with self._lock:
            return list(self._lines)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add lines; none of them may hold a newline.

        Raises:
            TierUnavailable: they are not there; the journal may be too large for them.
        """
        some = list(lines)
        with self._lock:
            nbytes = _checked_size(some, self.nbytes)
            self._lines += some
            self.nbytes = nbytes

    def replace(self, lines: Sequence[bytes]) -> None:
        """Put these in the place of all that is there, at once.

        Raises:
            TierUnavailable: all is as it was; they may be too large together.
        """
        with self._lock:
            self.nbytes = _checked_size(lines)
            self._lines = list(lines)


class FileJournal(Journal):
    """The same in a file, which one process at a time writes to.

    Args:
        path: of the file; made at the first line.
        read_only: why it is never written to; empty where it is.
    Raises:
        TierUnavailable: it is there and cannot be read.
    """

    def __init__(self, path: str, read_only: str = "") -> None:
        super().__init__()
        self._path = path
        self._read_only = read_only
        try:
            whole = self._load()
            if not whole and not read_only:  # or else the next line would be lost in the torn one
                self._write(f"{path}.tmp", self._lines, os.O_TRUNC)
                os.replace(f"{path}.tmp", path)
        except OSError as error:
            raise self._unavailable(error) from error

    def append(self, lines: Iterable[bytes]) -> None:
        self._check()
        some = list(lines)
        with self._lock:
            nbytes = _checked_size(some, self.nbytes)
            size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
            try:
                self._write(self._path, some, os.O_APPEND)
            except OSError as error:
                # Half a line would take the next one with it.
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                raise self._unavailable(error) from error
            self._lines += some
            self.nbytes = nbytes

    def replace(self, lines: Sequence[bytes]) -> None:
        self._check()
        with self._lock:
            nbytes = _checked_size(lines)
            try:
                self._write(f"{self._path}.tmp", lines, os.O_TRUNC)
                os.replace(f"{self._path}.tmp", self._path)
                folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                raise self._unavailable(error) from error
            self._lines = list(lines)
            self.nbytes = nbytes

    def _load(self) -> bool:
        """Read all lines; whether the file holds them and nothing else."""
        try:
            with open(self._path, "rb") as file:
                content = file.read(MAX_JOURNAL_BYTES + 1)
        except FileNotFoundError:
            return True
        *whole, torn = content.split(b"\n")
        good = [line[SUM_CHARS + 1 :] for line in whole if _is_good(line)]
        self.damaged = len(good) < len(whole) or len(content) > MAX_JOURNAL_BYTES
        self._lines = good
        self.nbytes = _size(good)
        return not (self.damaged or torn)

    def _check(self) -> None:
        if self._read_only:
            raise ReadOnly(f"{self._path} is not written to: {self._read_only}")

    def _write(self, path: str, lines: Sequence[bytes], how: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | how
        fd = os.open(path, flags, 0o600)
        try:
            left = memoryview(b"".join(_sum(line) + b" " + line + b"\n" for line in lines))
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _unavailable(self, error: OSError) -> TierUnavailable:
        return TierUnavailable(f"{self._path}: {error.strerror or error}")


def _sum(line: bytes) -> bytes:
    return b"%016x" % xxhash.xxh3_64_intdigest(line)


def _size(lines: Iterable[bytes]) -> int:
    return sum(SUM_CHARS + len(line) + 2 for line in lines)


def _checked_size(lines: Iterable[bytes], before: int = 0) -> int:
    """How large a journal is with these; raises `TierUnavailable` for one that nobody reads."""
    nbytes = before + _size(lines)
    if nbytes > MAX_JOURNAL_BYTES:
        raise TierUnavailable(f"a journal of {nbytes} bytes; {MAX_JOURNAL_BYTES} at most")
    return nbytes


def _is_good(line: bytes) -> bool:
    return line[SUM_CHARS : SUM_CHARS + 1] == b" " and line.startswith(_sum(line[SUM_CHARS + 1 :]))
