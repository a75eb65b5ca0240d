"""The folder of a disk tier as such: whose it is, which format and epoch, and who holds it now.

`docs/format.md` is its page. A folder that is not ours is never written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from kvstrata.errors import ConfigError, Incompatible, TierFull, TierUnavailable
from kvstrata.tiers.disk import scan as disk_scan

logger = logging.getLogger(__name__)

FORMAT = "kvstrata-disk 1\n"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# An empty file system has lost+found; the others are left when the very first start was killed.
_AS_GOOD_AS_EMPTY = frozenset({"lost+found", "lock", "FORMAT.tmp"})


def unavailable(error: OSError, doing: str) -> TierUnavailable:
    """The error of the tree for one of the operating system; the only place that maps them."""
    kind = TierFull if error.errno in _FULL else TierUnavailable
    reason = os.strerror(error.errno) if error.errno else str(error)
    return kind(f"disk: cannot {doing}: {reason}")


class DiskFolder:
    """An opened folder; made if it is missing or empty.

    Writable, it is locked for this process until `close`. Read-only (``reason`` then says why) it
    is not: readers of whole, renamed files disturb nobody.

    Raises:
        ConfigError: the path is no folder, or one with other things in it.
        Incompatible: the folder has another format version, or its epoch cannot be read.
        TierUnavailable: it cannot be read, or another process holds it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.path.abspath(path)
        self.objects = os.path.join(self.path, "objects")
        self.quarantine = os.path.join(self.path, "quarantine")
        self.epoch = 0
        self.reason = ""
        self.closed = False
        self._lock = -1
        self._num_removals = 0
        self._removal = threading.Condition()
        try:
            self._open()
        except OSError as error:
            self.close()
            raise unavailable(error, f"open {self.path}") from error
        except BaseException:
            self.close()
            raise

    @property
    def read_only(self) -> bool:
        return bool(self.reason)

    @property
    def file_system(self) -> str:
        """Type of the file system, for instance ``ext4`` or ``tmpfs``; empty if unknown."""
        return file_system_of(self.path)

    def check(self) -> None:
        """Raise TierUnavailable if the folder is closed, or gone, or has been replaced."""
        if self.closed:
            raise TierUnavailable(f"disk: {self.path} is closed")
        try:
            status = os.stat(self._witness)
        except FileNotFoundError as error:
            raise TierUnavailable(f"disk: {self.path} has vanished") from error
        except OSError as error:
            raise unavailable(error, f"look into {self.path}") from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise TierUnavailable(f"disk: {self.path} is not the folder that was opened")

    def advance_epoch(self) -> None:
        """Make the next epoch the current one, on disk first.

        Raises:
            TierUnavailable: it could not be written. On a read-only folder this process goes on
                with the next epoch all the same; the next process will not.
        """
        if self.read_only:
            self.epoch += 1
            raise TierUnavailable(
                f"disk: {self.path} is cleared for this process only, it is read only: "
                f"{self.reason}"
            )
        try:
            self._replace("epoch", f"{self.epoch + 1}\n")
        except OSError as error:
            raise unavailable(error, f"write {self.path}/epoch") from error
        self.epoch += 1

    def empty(self) -> None:
        """Put the shards out of the way, at once, and remove them in the background."""
        with contextlib.suppress(FileNotFoundError):
            if os.listdir(self.objects):
                name = f"trash-{self.epoch}-{secrets.token_hex(4)}"
                os.rename(self.objects, os.path.join(self.path, name))
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.objects, 0o700)
        self._remove_trash()

    def wait_for_trash(self, timeout_s: float) -> bool:
        """Wait until what `empty` put away takes no room any more; False after ``timeout_s``."""
        if not self._num_removals:
            return True
        with self._removal:
            return self._removal.wait_for(lambda: not self._num_removals, timeout_s)

    def close(self) -> None:
        """Let another process have the folder. Repeatable."""
        self.closed = True
        lock, self._lock = self._lock, -1
        if lock >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(lock, 0)
            # Unlock first: a forked child may still hold a copy of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                os.close(lock)

    def _open(self) -> None:
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise ConfigError("disk.path", f"{self.path} is not a folder")
        os.makedirs(self.path, 0o700, exist_ok=True)
        self.reason = self._why_not_writable()
        new = not self._is_ours()
        if self.read_only:
            if new:
                raise TierUnavailable(f"disk: {self.path} is empty and read only: {self.reason}")
            logger.warning("disk: %s is read only: %s", self.path, self.reason)
            self._read_epoch()
            self._watch("FORMAT")
            return
        self._take_lock()
        if new and not self._is_ours():
            self._replace("FORMAT", FORMAT)
        self._read_epoch()
        self._watch("lock")
        for folder in (self.objects, self.quarantine):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
        self._remove_trash()

    def _is_ours(self) -> bool:
        """Whether the folder has our format; False if it is as good as empty."""
        found = self._read("FORMAT")
        if found == FORMAT:
            return True
        if found is not None:
            first_line = found.partition("\n")[0][:80]
            raise Incompatible(
                f"disk: {self.path}/FORMAT says {first_line!r}; this build knows {FORMAT.strip()!r}"
            )
        names = set(os.listdir(self.path))
        foreign = sorted(names - _AS_GOOD_AS_EMPTY)
        if foreign and "FORMAT" not in names:
            raise ConfigError(
                "disk.path",
                f"{self.path} is not empty and not a folder of KVStrata (it has {foreign[0]!r}); "
                "expected an empty or a new one",
            )
        return False

    def _watch(self, name: str) -> None:
        # A lock that is held open keeps its inode, so no later folder can have the same.
        self._witness = os.path.join(self.path, name)
        status = os.stat(self._witness)
        self._identity = (status.st_dev, status.st_ino)

    def _why_not_writable(self) -> str:
        owner = os.stat(self.path).st_uid
        if owner != os.geteuid():
            return f"the folder belongs to user {owner}, this process runs as {os.geteuid()}"
        if os.statvfs(self.path).f_flag & os.ST_RDONLY:
            return "the file system is mounted read only"
        if not os.access(self.path, os.W_OK | os.X_OK, effective_ids=True):
            return "the folder is not writable"
        return ""

    def _take_lock(self) -> None:
        self._lock = os.open(
            os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._lock)
            self._lock = -1
            raise TierUnavailable(f"disk: {self.path} is held by process {holder}") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _read_epoch(self) -> None:
        text = self._read("epoch")
        if text is None and not os.path.lexists(self.objects) and not self.read_only:
            self._replace("epoch", "0\n")  # new, or killed while it was made
            return
        if text is None or not re.fullmatch(r"(0|[1-9][0-9]{0,15})\n", text):
            # Without it nobody knows what was cleared.
            raise Incompatible(
                f"disk: {self.path}/epoch is missing or damaged; remove the folder to start anew"
            )
        self.epoch = int(text)

    def _remove_trash(self) -> None:
        names = [name for name in os.listdir(self.path) if name.startswith("trash-")]
        if not names:
            return
        trash = [os.path.join(self.path, name) for name in names]
        with self._removal:
            self._num_removals += 1

        def work() -> None:
            try:
                run_walk("remove", *trash).communicate()
            except TierUnavailable:  # then here, at the expense of the other threads
                for folder in trash:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                with self._removal:
                    self._num_removals -= 1
                    self._removal.notify_all()

        threading.Thread(target=work, name="kvstrata-disk-trash", daemon=True).start()

    def _read(self, name: str) -> str | None:
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read(4096).decode("ascii", "replace")
        except FileNotFoundError:
            return None

    def _replace(self, name: str, text: str) -> None:
        """Atomic, and synced: these files are rare, and a lost epoch would undo a clear."""
        path = os.path.join(self.path, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        fd = os.open(f"{path}.tmp", flags, 0o600)
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(f"{path}.tmp", path)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def run_walk(*arguments: str) -> subprocess.Popen[bytes]:
    """Start `disk_scan` as a program; its output and its complaints are pipes."""
    # -I -S: neither the environment nor site-packages; the start takes 10 ms.
    command = [sys.executable, "-I", "-S", disk_scan.__file__, *arguments]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise unavailable(error, f"start {sys.executable or 'an interpreter'}") from error


def file_system_of(path: str | Path) -> str:
    """Type of the file system that holds a path, as the mount table names it; empty if unknown."""
    real = os.path.realpath(path)
    best, kind = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of equal ones the last is mounted on top
            best, kind = point, after.split()[0]
    return kind
