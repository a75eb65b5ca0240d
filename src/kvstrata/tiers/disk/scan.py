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
from typing import NamedTuple

PAGE = 4096

# Last use (ns), object id, size. Big-endian, so that sorting the bytes sorts by last use.
RECORD = struct.Struct(">Q36sQ")
# Records that follow, names that are nobody's, stale files that were removed.
HEADER = struct.Struct(">QQQ")

_NAME = re.compile(r"([0-9a-f]{72})-([1-9a-f][0-9a-f]{0,14})-(0|[1-9a-f][0-9a-f]{0,14})\.kvo")


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
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    nbytes = int(match[2], 16)
    if nbytes % PAGE:
        return None
    return StoredName(bytes.fromhex(match[1]), nbytes, int(match[3], 16))


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
        for shard in self._list(objects):
            if len(shard.name) != 2 or not shard.is_dir(follow_symlinks=False):
                self.num_malformed += 1
                continue
            for entry in self._list(shard.path):
                self._see(shard.name, entry)
        self.records.sort()

    def _list(self, folder: str) -> list[os.DirEntry[str]]:
        # Whole, before anything is removed from it; a folder that a clear took away is empty.
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def _see(self, shard: str, entry: os.DirEntry[str]) -> None:
        if entry.name.endswith(".tmp"):
            if not entry.name.endswith(self._living):
                self._remove(entry)
            return
        stored = parse_name(entry.name)
        if stored is None or entry.name[:2] != shard or not entry.is_file(follow_symlinks=False):
            self.num_malformed += 1
            return
        if stored.epoch < self._epoch:
            self._remove(entry)
            return
        if stored.epoch > self._epoch:  # written after a clear that this walk does not know of
            return
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # evicted meanwhile
            return
        if status.st_size != stored.nbytes:  # cut short by a power loss
            self._remove(entry)
            return
        last_use = max(0, status.st_mtime_ns)
        self.records.append(RECORD.pack(last_use, stored.object_id, stored.nbytes))

    def _remove(self, entry: os.DirEntry[str]) -> None:
        # Once the owner is dead another may own the folder, and write under names unknown here.
        if self._owner == 0 or os.getppid() != self._owner:
            return
        try:
            os.unlink(entry.path)
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
