"""Names of stored files, and the slow walks over them as a program of its own.

A walk over 100,000 names would hold up the node's loop, so the disk tier runs this file by its
path in a subprocess; it therefore imports nothing but the standard library. `docs/format.md` says
what a name means.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
from functools import lru_cache
from stat import S_ISREG
from typing import NamedTuple

PAGE = 4096

# Last use (ns), object id, size. Big-endian, so that sorting the bytes sorts by last use.
RECORD = struct.Struct(">Q36sQ")
# Records that follow, names that are nobody's, stale files that were removed.
HEADER = struct.Struct(">QQQ")

_ID_DIGITS = 72
_REST = re.compile(r"-([1-9a-f][0-9a-f]{0,14})-(0|[1-9a-f][0-9a-f]{0,14})\.kvo")


class StoredName(NamedTuple):
    """What a file's name says: the object's id, the file's size in bytes, its epoch."""

    object_id: bytes
    nbytes: int
    epoch: int


def file_name(object_id: bytes, nbytes: int, epoch: int) -> str:
    """The one name of an object's file, without its folder."""
    return f"{object_id.hex()}-{nbytes:x}-{epoch:x}.kvo"


def parse_name(name: str) -> StoredName | None:
    """The inverse of `file_name`; None for what that would never make."""
    rest = _parse_rest(name[_ID_DIGITS:])
    if rest is None:
        return None
    digits = name[:_ID_DIGITS]
    try:
        object_id = bytes.fromhex(digits)
    except ValueError:
        return None
    return StoredName(object_id, *rest) if object_id.hex() == digits else None


@lru_cache(1024)  # a folder has few sizes and epochs
def _parse_rest(rest: str) -> tuple[int, int] | None:
    """Size and epoch, which stand behind the id."""
    match = _REST.fullmatch(rest)
    if match is None:
        return None
    nbytes, epoch = int(match[1], 16), int(match[2], 16)
    return None if nbytes % PAGE else (nbytes, epoch)


class Walk:
    """One walk over the shards: what is stored now, and what is left of earlier times.

    Args:
        objects: the folder with the shards.
        epoch: files of this epoch are stored; of an earlier one, stale.
        token: unfinished files whose name carries it are being written by the living owner.
        owner: process on whose behalf stale files are removed, as long as it lives; 0: never.
    """

    def __init__(self, objects: str, epoch: int, token: str, owner: int) -> None:
        self.records: list[bytes] = []
        self.num_malformed = 0
        self.num_removed = 0
        self._epoch = epoch
        self._owner = owner
        self._living = f".{token}.tmp"
        try:
            with os.scandir(objects) as entries:
                shards = list(entries)
        except FileNotFoundError:  # a clear took it away
            shards = []
        for shard in shards:
            if len(shard.name) != 2 or not shard.is_dir(follow_symlinks=False):
                self.num_malformed += 1
                continue
            try:
                fd = os.open(shard.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                for name in os.listdir(fd):
                    self._see(shard.name, fd, name)
            finally:
                os.close(fd)
        self.records.sort()

    def _see(self, shard: str, fd: int, name: str) -> None:
        if name.endswith(".tmp"):
            if not name.endswith(self._living):
                self._remove(fd, name)
            return
        stored = parse_name(name)
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:  # evicted meanwhile
            return
        if stored is None or name[:2] != shard or not S_ISREG(status.st_mode):
            self.num_malformed += 1
            return
        object_id, nbytes, epoch = stored
        if epoch < self._epoch or (epoch == self._epoch and status.st_size != nbytes):
            self._remove(fd, name)  # cleared, or cut short by a power loss
        elif epoch == self._epoch:  # a later one was written after a clear unknown to this walk
            self.records.append(RECORD.pack(max(0, status.st_mtime_ns), object_id, nbytes))

    def _remove(self, fd: int, name: str) -> None:
        # Once the owner is dead another may own the folder, and write under names unknown here.
        if self._owner == 0 or os.getppid() != self._owner:
            return
        try:
            os.unlink(name, dir_fd=fd)
        except OSError:
            return
        self.num_removed += 1


def main(arguments: list[str]) -> None:
    """`scan OBJECTS EPOCH TOKEN OWNER` writes a header and records; `remove FOLDER...` removes."""
    if arguments[0] == "remove":
        for folder in arguments[1:]:
            shutil.rmtree(folder, ignore_errors=True)
        return
    objects, epoch, token, owner = arguments[1:]
    walk = Walk(objects, int(epoch), token, int(owner))
    try:
        out = sys.stdout.buffer
        out.write(HEADER.pack(len(walk.records), walk.num_malformed, walk.num_removed))
        out.writelines(walk.records)
        out.flush()
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
