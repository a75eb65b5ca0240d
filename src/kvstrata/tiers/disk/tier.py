"""The tier on local disk: one file an object, written aside and renamed; the names are the index.

Where an object lies follows from its id, its size and the epoch, so its size is all that is kept
of it in memory. `docs/format.md` is the page.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.objects import HEADER_BYTES
from kvstrata.tables import Table
from kvstrata.tiers.base import Found, Outcome, OwnedTier, Put, Stat
from kvstrata.tiers.disk.folder import DiskFolder, run_walk, unavailable
from kvstrata.tiers.disk.quarantine import Quarantine
from kvstrata.tiers.disk.scan import HEADER, RECORD, file_name, parse_name
from kvstrata.tiers.disk.transfer import transfer
from kvstrata.tiers.journal import FileJournal

logger = logging.getLogger(__name__)

SCAN_BATCH = 1024
TRASH_WAIT_S = 5.0
NUM_LOCKS = 16

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

A = TypeVar("A")


class DiskTier(OwnedTier):
    """Objects in a folder on a local disk.

    Reads and writes go past the page cache (O_DIRECT) where the file system allows it; a buffer
    that is not aligned to 4096 bytes in address and length counts as "does not allow".

    ``write`` raises TierFull at the first object that finds no room; those before it are stored.
    ``delete`` and ``reject`` raise only if they changed nothing. On a read-only folder ``write``
    raises TierFull, ``delete`` and ``reject`` answer FAILED, ``clear`` raises TierUnavailable.
    ``reject`` keeps the last 16 files in ``quarantine/``, beside what the tier stores. Objects have
    no version: ``delete`` with one is a miss.

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
        # Changes in the shards of one stripe, so that an id has one file; a clear takes all.
        self._locks = [threading.Lock() for _ in range(NUM_LOCKS)]
        # Of all objects once a scan has ended; until then the shard of the others is listed.
        self._sizes: Table[int] = Table()
        self._sizes_complete = False
        self._quarantine = Quarantine(self._folder.quarantine)
        try:
            where = os.path.join(self._folder.path, "journal")
            self._journal = FileJournal(where, self._folder.reason)
        except TierUnavailable:
            self._folder.close()
            raise
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

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        return self._for_each("look for", self._stat_one, ids)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        return self._for_each("read", self._read_one, ids, into)

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        return self._for_each("read", self._header_one, ids)

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        if self.read_only:
            raise TierFull(f"disk: {self.path} is read only: {self.read_only_reason}")
        if not self._folder.wait_for_trash(TRASH_WAIT_S):
            raise TierFull(f"disk: {self.path} still removes what was cleared")
        return self._for_each("write", self._write_one, [put.object_id for put in puts], puts)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        wanted = [not version for version in versions or [""] * len(ids)]
        return self._take_out(ids, "delete", os.unlink, wanted)

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        outcomes = self._take_out(ids, "reject", self._quarantine.take, [True] * len(ids))
        self._quarantine.prune()
        return outcomes

    def touch(self, ids: Sequence[bytes]) -> None:
        self._folder.check()
        if self.read_only:
            return
        for object_id in ids:
            now = time.time_ns()  # finer than the kernel's own clock for files
            with contextlib.suppress(OSError):
                for nbytes in self._sizes_of(object_id):
                    os.utime(self._path(object_id, nbytes), ns=(now, now))

    def scan(self) -> Iterator[list[Found]]:
        """See `Tier.scan`. Also removes what earlier processes left unfinished or cleared.

        Ends early when the tier is cleared meanwhile.

        Raises:
            TierUnavailable: while iterating, if the walk fails.
        """
        self._folder.check()
        epoch, sizes = self.epoch, self._sizes
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
                for found in batch:  # unless it has been replaced since the walk
                    sizes.setdefault(found.object_id, found.nbytes)
                if self.epoch != epoch:
                    return
                yield batch
        finally:
            process.kill()
            process.communicate()
        # Whoever owns a folder that is read only here may go on writing to it.
        self._sizes_complete = self._sizes_complete or not self.read_only

    def clear(self) -> None:
        self._folder.check()
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            try:
                self._advance_epoch()
                # From here on nothing stored before can be found, whatever becomes of the files.
                self._sizes, self._sizes_complete = Table(), True
                self._folder.empty()
            except OSError as error:
                raise unavailable(error, f"clear {self.path}") from error

    def close(self) -> None:
        self._folder.close()

    def _for_each(
        self, verb: str, work: Callable[..., A], ids: Sequence[bytes], *with_each: Sequence[object]
    ) -> list[A | Outcome]:
        """``work`` on each id, with what belongs to it if there is anything."""
        self._folder.check()
        answers: list[A | Outcome] = []
        for object_id, *rest in zip(ids, *with_each, strict=True):
            try:
                answers.append(work(object_id, *rest))
            except FileNotFoundError:
                self._folder.check()
                answers.append(Outcome.FAILED if verb == "write" else Outcome.MISS)
            except OSError as error:
                answers.append(self._failed(error, f"{verb} {object_id.hex()} in {self.path}"))
        return answers

    def _failed(self, error: OSError, doing: str) -> Outcome:
        problem = unavailable(error, doing)
        self.last_error = str(problem)
        if error.errno in _OF_ONE_OBJECT:
            return Outcome.FAILED
        raise problem from error

    def _stat_one(self, object_id: bytes) -> Stat | Outcome:
        for nbytes in self._sizes_of(object_id):
            status = os.stat(self._path(object_id, nbytes), follow_symlinks=False)
            return Stat(nbytes) if status.st_size == nbytes else Outcome.FAILED
        return Outcome.MISS

    def _read_one(self, object_id: bytes, into: memoryview) -> int | Outcome:
        for nbytes in self._sizes_of(object_id):
            if nbytes > len(into):
                return Outcome.FAILED
            return self._read_file(self._path(object_id, nbytes), nbytes, into[:nbytes])
        return Outcome.MISS

    def _header_one(self, object_id: bytes) -> bytes | Outcome:
        page = memoryview(mmap.mmap(-1, HEADER_BYTES))
        for nbytes in self._sizes_of(object_id):
            answer = self._read_file(self._path(object_id, nbytes), nbytes, page)
            return answer if isinstance(answer, Outcome) else bytes(page)
        return Outcome.MISS

    def _read_file(self, path: str, nbytes: int, into: memoryview) -> int | Outcome:
        """Read the beginning of a file that is to have so many bytes."""

        def work(flags: int) -> int | Outcome:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags)
            try:
                whole = os.fstat(fd).st_size == nbytes
                whole = whole and transfer(os.preadv, fd, [into]) == len(into)
                return len(into) if whole else Outcome.FAILED
            finally:
                os.close(fd)

        try:
            return self._in_mode(work)
        except OSError as error:
            if error.errno == errno.EIO and not self.read_only:
                # A bad sector must not take the tier down each time its object is asked for.
                with contextlib.suppress(OSError):
                    self._quarantine.take(path)
                self._quarantine.prune()
            raise

    def _write_one(self, object_id: bytes, put: Put) -> Outcome:
        epoch = self.epoch
        path = self._path(object_id, put.nbytes)
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
                if transfer(os.pwritev, fd, [put.header_page, put.payload]) != put.nbytes:
                    return Outcome.FAILED
                now = time.time_ns()  # finer than the kernel's own clock for files
                os.utime(fd, ns=(now, now))
            finally:
                os.close(fd)
            return self._publish(put, unfinished, path, epoch)

        outcome = Outcome.FAILED
        try:
            if put.if_absent and self._is_there(object_id):
                return Outcome.MISS
            outcome = self._in_mode(work)
        finally:
            if outcome is not Outcome.HIT:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
        return outcome

    def _publish(self, put: Put, unfinished: str, path: str, epoch: int) -> Outcome:
        object_id = put.object_id
        with self._locks[object_id[0] % NUM_LOCKS]:
            if self._folder.closed or self.epoch != epoch:
                return Outcome.FAILED
            if put.if_absent and self._is_there(object_id):
                return Outcome.MISS
            for nbytes in self._sizes_of(object_id):
                if nbytes != put.nbytes:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self._path(object_id, nbytes))
            os.rename(unfinished, path)
            self._sizes[object_id] = put.nbytes
        return Outcome.HIT

    def _is_there(self, object_id: bytes) -> bool:
        return any(os.path.lexists(self._path(object_id, n)) for n in self._sizes_of(object_id))

    def _take_out(
        self,
        ids: Sequence[bytes],
        verb: str,
        remove: Callable[[str], None],
        wanted: Sequence[bool],
    ) -> list[Outcome]:
        """MISS, HIT or FAILED each; raises only if all that could be tried failed."""
        self._folder.check()
        if self.read_only:
            return [Outcome.FAILED] * len(ids)
        outcomes, problem = [], None
        for object_id, want in zip(ids, wanted, strict=True):
            outcome = Outcome.MISS
            try:
                if want:
                    outcome = self._take_out_one(object_id, remove)
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

    def _take_out_one(self, object_id: bytes, remove: Callable[[str], None]) -> Outcome:
        outcome = Outcome.MISS
        with self._locks[object_id[0] % NUM_LOCKS]:
            for nbytes in self._sizes_of(object_id):
                with contextlib.suppress(FileNotFoundError):
                    remove(self._path(object_id, nbytes))
                    outcome = Outcome.HIT
            self._sizes.pop(object_id)
        return outcome

    def _path(self, object_id: bytes, nbytes: int) -> str:
        shard = f"{self._folder.objects}/{object_id[:1].hex()}"
        return f"{shard}/{file_name(object_id, nbytes, self.epoch)}"

    def _sizes_of(self, object_id: bytes) -> list[int]:
        """Under which sizes there is, or was, an object: one at most, as long as all is well."""
        nbytes = self._sizes.get(object_id)
        if nbytes is not None or self._sizes_complete:
            return [] if nbytes is None else [nbytes]
        try:
            names = os.listdir(f"{self._folder.objects}/{object_id[:1].hex()}")
        except FileNotFoundError:
            return []
        stored = [parse_name(name) for name in names if name.startswith(object_id.hex())]
        return [one.nbytes for one in stored if one is not None and one.epoch == self.epoch]

    def _advance_epoch(self) -> None:
        try:
            self._folder.advance_epoch()
        except TierFull:
            # No room even for a number. What is about to be cleared makes it.
            self._folder.empty()
            self._folder.wait_for_trash(TRASH_WAIT_S)
            self._folder.advance_epoch()

    def _in_mode(self, work: Callable[[int], A]) -> A:
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


def _last_words(process: subprocess.Popen[bytes]) -> str:
    _, words = process.communicate()
    lines = words.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"
