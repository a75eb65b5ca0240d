"""The tier on local disk: one file an object, written aside and renamed; the names are the index.

The tier keeps nothing about single objects in memory. Where an object lies follows from its id, its
size and the epoch; what is there, the file system knows. `docs/format.md` is the page.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.base import Found, Outcome, Tier
from kvstrata.tiers.disk.folder import DiskFolder, run_walk, unavailable
from kvstrata.tiers.disk.scan import HEADER, PAGE, RECORD, file_name

logger = logging.getLogger(__name__)

MAX_QUARANTINED = 16
SCAN_BATCH = 4096
TRASH_WAIT_S = 5.0
NUM_LOCKS = 16

# With few sizes (one per layer group, while no codec compresses) the names an id can have are
# tried one by one; a list of a shard costs more than so many failed look-ups.
MAX_SIZES = 32

# These concern the one object whose file was asked for; all others concern the tier.
_OF_ONE_OBJECT = frozenset(
    {
        errno.EFBIG,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EEXIST,
        errno.EBADMSG,
        errno.EUCLEAN,
    }
)

_Transfer = Callable[[int, Sequence[memoryview], int], int]


class DiskTier(Tier):
    """Objects in a folder on a local disk.

    Reads and writes go past the page cache (O_DIRECT) where the file system allows it; a buffer
    that is not aligned to 4096 bytes in address and length counts as "does not allow".

    ``write`` raises TierFull at the first object that finds no room; those before it are stored.
    ``delete`` and ``reject`` raise only if they changed nothing. On a read-only folder ``write``
    raises TierFull, ``delete`` and ``reject`` answer FAILED, ``clear`` raises TierUnavailable.
    ``reject`` keeps the last 16 files in ``quarantine/``, beside what the tier stores.

    Args:
        path: the folder; made if missing. One process at a time can write to it.
        direct: False: always through the page cache.
    Raises:
        ConfigError, Incompatible, TierUnavailable: see `DiskFolder`.
    """

    name = "disk"

    def __init__(self, path: str | Path, direct: bool = True) -> None:
        self._folder = DiskFolder(path)
        self._direct = direct
        self.last_error = ""
        self.num_malformed = 0
        self.num_stale_removed = 0
        self._token = f"{os.getpid():x}-{secrets.token_hex(4)}"
        self._count = itertools.count()
        # Renames into the shards of one stripe, so that an id has one file; a clear takes all.
        self._locks = [threading.Lock() for _ in range(NUM_LOCKS)]
        self._sizes: frozenset[int] = frozenset()
        self._sizes_complete = False
        self._size_lock = threading.Lock()
        self._quarantining = threading.Lock()
        try:
            if not self.read_only:
                self._sizes_complete = not os.listdir(self._folder.objects)
            if self._direct:
                self._probe()
        except OSError as error:
            self._folder.close()
            raise unavailable(error, f"open {self.path}") from error

    @property
    def path(self) -> str:
        """The folder, absolute."""
        return self._folder.path

    @property
    def epoch(self) -> int:
        return self._folder.epoch

    @property
    def direct(self) -> bool:
        """Whether reads and writes go past the page cache."""
        return self._direct

    @property
    def read_only(self) -> bool:
        """Whether the folder is only read; `read_only_reason` says why."""
        return self._folder.read_only

    @property
    def read_only_reason(self) -> str:
        return self._folder.reason

    @property
    def file_system(self) -> str:
        """Type of the file system, for instance ``ext4``; ``tmpfs`` is memory, not a disk."""
        return self._folder.file_system

    @property
    def quarantine_bytes(self) -> int:
        """Size of what was rejected and kept, in bytes; it is not part of what the tier stores."""
        try:
            with os.scandir(self._folder.quarantine) as entries:
                return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
        except OSError:
            return 0

    def contains(self, ids: Sequence[bytes]) -> list[Outcome]:
        return self._for_each("look for", self._contains_one, ids)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        return self._for_each("read", self._read_one, ids, into)

    def write(self, objects: Sequence[tuple[bytes, memoryview]]) -> list[Outcome]:
        if self.read_only:
            raise TierFull(f"disk: {self.path} is read only: {self.read_only_reason}")
        if not self._folder.wait_for_trash(TRASH_WAIT_S):
            raise TierFull(f"disk: {self.path} still removes what was cleared")
        ids, buffers = [object_id for object_id, _ in objects], [data for _, data in objects]
        return self._for_each("write", self._write_one, ids, buffers)

    def delete(self, ids: Sequence[bytes]) -> list[Outcome]:
        return self._take_out(ids, "delete", os.unlink)

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        outcomes = self._take_out(ids, "reject", self._quarantine)
        self._prune_quarantine()
        return outcomes

    def touch(self, ids: Sequence[bytes]) -> None:
        self._folder.check()
        if self.read_only:
            return
        for object_id in ids:
            now = time.time_ns()  # finer than the kernel's own clock for files
            with contextlib.suppress(OSError):
                for path in self._paths(object_id):
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(path, ns=(now, now))

    def scan(self) -> Iterator[list[Found]]:
        """See `Tier.scan`. Also removes what earlier processes left unfinished or cleared.

        Ends early when the tier is cleared meanwhile.

        Raises:
            TierUnavailable: while iterating, if the walk fails.
        """
        self._folder.check()
        epoch, sizes = self.epoch, set[int]()
        owner = 0 if self.read_only else os.getpid()
        process = run_walk("scan", self._folder.objects, str(epoch), self._token, str(owner))
        try:
            assert process.stdout is not None
            head = process.stdout.read(HEADER.size)
            if len(head) != HEADER.size:
                raise TierUnavailable(
                    f"disk: the scan of {self.path} failed: {_last_words(process)}"
                )
            num_left, self.num_malformed, self.num_stale_removed = HEADER.unpack(head)
            if self.num_malformed:
                logger.warning("disk: %s: %d foreign names", self.path, self.num_malformed)
            while num_left:
                num = min(num_left, SCAN_BATCH)
                data = process.stdout.read(num * RECORD.size)
                if len(data) != num * RECORD.size:
                    why = _last_words(process)
                    raise TierUnavailable(f"disk: the scan of {self.path} broke off: {why}")
                num_left -= num
                batch = [Found(i, n, ns / 1e9) for ns, i, n in RECORD.iter_unpack(data)]
                sizes.update(found.nbytes for found in batch)
                if self.epoch != epoch:
                    return
                yield batch
        finally:
            process.kill()
            process.communicate()
        with self._size_lock:
            if self.epoch == epoch:
                self._sizes |= sizes
                self._sizes_complete = True

    def clear(self) -> None:
        self._folder.check()
        with contextlib.ExitStack() as stack:
            for lock in (*self._locks, self._size_lock):
                stack.enter_context(lock)
            try:
                self._advance_epoch()
                # From here on nothing stored before can be found, whatever becomes of the files.
                self._sizes, self._sizes_complete = frozenset(), True
                self._folder.empty()
            except OSError as error:
                raise unavailable(error, f"clear {self.path}") from error

    def close(self) -> None:
        self._folder.close()

    def _for_each(
        self,
        verb: str,
        work: Callable[..., Outcome],
        ids: Sequence[bytes],
        *buffers: Sequence[memoryview],
    ) -> list[Outcome]:
        """``work`` on each id, with its buffer if there are any."""
        self._folder.check()
        outcomes = []
        for object_id, *buffer in zip(ids, *buffers, strict=True):
            try:
                outcomes.append(work(object_id, *buffer))
            except FileNotFoundError:
                self._folder.check()
                outcomes.append(Outcome.FAILED if verb == "write" else Outcome.MISS)
            except OSError as error:
                outcomes.append(self._failed(error, f"{verb} {object_id.hex()} in {self.path}"))
        return outcomes

    def _failed(self, error: OSError, doing: str) -> Outcome:
        problem = unavailable(error, doing)
        self.last_error = str(problem)
        if error.errno in _OF_ONE_OBJECT:
            return Outcome.FAILED
        raise problem from error

    def _contains_one(self, object_id: bytes) -> Outcome:
        for path in self._paths(object_id):
            with contextlib.suppress(FileNotFoundError):
                os.stat(path, follow_symlinks=False)
                return Outcome.HIT
        return Outcome.MISS

    def _read_one(self, object_id: bytes, into: memoryview) -> Outcome:
        path = self._path(object_id, len(into))

        def work(flags: int) -> Outcome:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags)
            try:
                whole = os.fstat(fd).st_size == len(into)
                whole = whole and _transfer(os.preadv, fd, into) == len(into)
                return Outcome.HIT if whole else Outcome.FAILED
            finally:
                os.close(fd)

        try:
            return self._in_mode(work)
        except OSError as error:
            if error.errno == errno.EIO and not self.read_only:
                # A bad sector must not take the tier down each time its object is asked for.
                with contextlib.suppress(OSError):
                    self._quarantine(path)
                self._prune_quarantine()
            raise

    def _write_one(self, object_id: bytes, data: memoryview) -> Outcome:
        epoch = self.epoch
        path = self._path(object_id, len(data))
        shard = os.path.dirname(path)
        unfinished = f"{shard}/{object_id.hex()}-{next(self._count):x}.{self._token}.tmp"

        def work(flags: int) -> Outcome:
            flags |= os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            try:
                fd = os.open(unfinished, flags, 0o600)
            except FileNotFoundError:
                for folder in (self._folder.objects, shard):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, 0o700)
                fd = os.open(unfinished, flags, 0o600)
            try:
                if _transfer(os.pwritev, fd, data) != len(data):
                    return Outcome.FAILED
                now = time.time_ns()  # finer than the kernel's own clock for files
                os.utime(fd, ns=(now, now))
            finally:
                os.close(fd)
            return self._publish(object_id, unfinished, path, len(data), epoch)

        try:
            outcome = self._in_mode(work)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        if outcome is not Outcome.HIT:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
        return outcome

    def _publish(
        self, object_id: bytes, unfinished: str, path: str, nbytes: int, epoch: int
    ) -> Outcome:
        with self._locks[object_id[0] % NUM_LOCKS]:
            if self._folder.closed or self.epoch != epoch:
                return Outcome.FAILED
            for other in self._paths(object_id):
                if other != path:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(other)
            if nbytes not in self._sizes:
                with self._size_lock:
                    self._sizes |= {nbytes}
            os.rename(unfinished, path)
        return Outcome.HIT

    def _take_out(
        self, ids: Sequence[bytes], verb: str, remove: Callable[[str], None]
    ) -> list[Outcome]:
        """MISS, HIT or FAILED each; raises only if all that could be tried failed."""
        self._folder.check()
        if self.read_only:
            return [Outcome.FAILED] * len(ids)
        outcomes, problem = [], None
        for object_id in ids:
            outcome = Outcome.MISS
            try:
                for path in self._paths(object_id):
                    with contextlib.suppress(FileNotFoundError):
                        remove(path)
                        outcome = Outcome.HIT
            except OSError as error:
                outcome = Outcome.FAILED
                try:
                    self._failed(error, f"{verb} {object_id.hex()} in {self.path}")
                except TierUnavailable as unavailable_tier:
                    problem = unavailable_tier
            outcomes.append(outcome)
        if problem is not None and Outcome.HIT not in outcomes:
            raise problem
        return outcomes

    def _path(self, object_id: bytes, nbytes: int) -> str:
        shard = f"{self._folder.objects}/{object_id[:1].hex()}"
        return f"{shard}/{file_name(object_id, nbytes, self.epoch)}"

    def _paths(self, object_id: bytes) -> list[str]:
        """Where an object may lie, whatever its size; not all of it need exist."""
        if self._sizes_complete and len(self._sizes) <= MAX_SIZES:
            return [self._path(object_id, nbytes) for nbytes in self._sizes]
        shard = f"{self._folder.objects}/{object_id[:1].hex()}"
        start, end = f"{object_id.hex()}-", f"-{self.epoch:x}.kvo"
        try:
            names = os.listdir(shard)
        except FileNotFoundError:
            return []
        return [
            f"{shard}/{name}" for name in names if name.startswith(start) and name.endswith(end)
        ]

    def _quarantine(self, path: str) -> None:
        try:
            os.rename(path, os.path.join(self._folder.quarantine, os.path.basename(path)))
        except FileNotFoundError:
            raise
        except OSError:
            os.unlink(path)  # out of service, at least

    def _prune_quarantine(self) -> None:
        with self._quarantining, contextlib.suppress(OSError):
            with os.scandir(self._folder.quarantine) as entries:
                # A rename sets the change time; the other times are the object's.
                kept = sorted((entry.stat().st_ctime_ns, entry.path) for entry in entries)
            for _, path in kept[:-MAX_QUARANTINED]:
                os.unlink(path)

    def _advance_epoch(self) -> None:
        try:
            self._folder.advance_epoch()
        except TierFull:
            # No room even for a number. What is about to be cleared makes it.
            self._folder.empty()
            self._folder.wait_for_trash(TRASH_WAIT_S)
            self._folder.advance_epoch()

    def _in_mode(self, work: Callable[[int], Outcome]) -> Outcome:
        """Do it with O_DIRECT; where that is refused, from then on without."""
        if self._direct:
            try:
                return work(os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._fall_back()
        return work(0)

    def _probe(self) -> None:
        try:
            os.close(os.open(os.path.join(self.path, "FORMAT"), os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fall_back()

    def _fall_back(self) -> None:
        if self._direct:
            self._direct = False
            logger.warning(
                "disk: %s (%s) refuses O_DIRECT; going through the page cache",
                self.path,
                self.file_system,
            )


def _transfer(call: _Transfer, fd: int, buffer: memoryview) -> int:
    """Move a whole buffer from or to the start of a file; returns the bytes moved."""
    done = 0
    while done < len(buffer):
        num = call(fd, [buffer[done:]], done)
        # O_DIRECT goes on at a page only; a part of a page is done again.
        ahead = done + num if done + num == len(buffer) else (done + num) // PAGE * PAGE
        if ahead <= done:
            break
        done = ahead
    return done


def _last_words(process: subprocess.Popen[bytes]) -> str:
    _, words = process.communicate()
    lines = words.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"
