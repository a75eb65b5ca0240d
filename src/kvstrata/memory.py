"""The pool: one region of shared memory, and who may use which part of it.

`Pool` is a sealed memfd that the node makes; `PoolMapping` is the same memory seen by a
client that received the descriptor; `SlotAllocator` hands out the bytes, exactly and never
more than there are. `available_bytes` says how large a pool may be.
"""

from __future__ import annotations

import fcntl
import os
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstrata import mapping
from kvstrata.errors import Incompatible, TierUnavailable, UsageError

__all__ = ["Pool", "PoolMapping", "SlotAllocator", "available_bytes", "total_bytes"]

ALIGNMENT = 4096

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# The kernel holds the address space's lock for one whole madvise call, and whatever else the
# process maps or unmaps meanwhile waits. 2 MiB keeps that wait to a few milliseconds even where
# memory is slow to come, and costs no throughput.
_POPULATE_PIECE = mapping.HUGE_BYTES


class SlotAllocator:
    """Hand out aligned ranges of `[0, capacity_bytes)`: best fit, neighbours joined on free.

    Among free ranges of the best size the one freed last is taken (its pages are warm). A fresh
    allocator hands out the lowest offsets first, the order in which the pool is faulted in.
    Both verbs take a few dictionary operations plus a search among the distinct free sizes, of
    which there are at most `sqrt(2 * capacity_bytes / alignment)`.

    Not thread-safe: the node's loop owns it.

    Args:
        capacity_bytes: rounded down to a multiple of `alignment`.
        alignment: bytes; every offset and every size is a multiple of it.
    Raises:
        UsageError: the capacity is below one alignment, or the alignment is not positive.
    """

    def __init__(self, capacity_bytes: int, alignment: int = ALIGNMENT) -> None:
        if alignment <= 0 or capacity_bytes < alignment:
            raise UsageError(f"capacity {capacity_bytes} does not hold one slot of {alignment}")
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self._live: dict[int, int] = {}  # offset -> size
        self._free_size: dict[int, int] = {}  # offset -> size
        self._free_at_end: dict[int, int] = {}  # offset + size -> offset
        self._bins: dict[int, dict[int, None]] = {}  # size -> offsets, a stack with removal
        self._sizes: list[int] = []  # the keys of _bins, ascending
        self._last_size = 0
        self._allocated_bytes = 0
        self._add_free(0, self.capacity_bytes)

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self._allocated_bytes

    @property
    def largest_free(self) -> int:
        """The largest size that `allocate` can satisfy now, in bytes; 0 if full."""
        return self._sizes[-1] if self._sizes else 0

    def __len__(self) -> int:
        """The number of live allocations."""
        return len(self._live)

    def allocate(self, nbytes: int) -> int | None:
        """Return the offset of a range of `nbytes` rounded up to the alignment, or None.

        Raises:
            UsageError: `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise UsageError(f"cannot allocate {nbytes} bytes")
        need = -(-nbytes // self.alignment) * self.alignment
        # Slots mostly come in one size: sharing its number saves a quarter of the memory.
        need = self._last_size = self._last_size if need == self._last_size else need
        place = bisect_left(self._sizes, need)
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        offset, _ = self._bins[size].popitem()
        if not self._bins[size]:
            del self._bins[size]
            del self._sizes[place]
        del self._free_size[offset]
        del self._free_at_end[offset + size]
        if size > need:
            self._add_free(offset + need, size - need)
        self._live[offset] = need
        self._allocated_bytes += need
        return offset

    def free(self, offset: int) -> None:
        """Give a range back.

        Raises:
            UsageError: no live allocation begins at `offset`; nothing has changed.
        """
        size = self._live.pop(offset, None)
        if size is None:
            raise UsageError(f"no allocation begins at offset {offset}")
        self._allocated_bytes -= size
        end = offset + size
        after = self._free_size.get(end)
        if after is not None:
            self._remove_free(end, after)
            end += after
        before = self._free_at_end.get(offset)
        if before is not None:
            self._remove_free(before, offset - before)
            offset = before
        self._add_free(offset, end - offset)

    def size(self, offset: int) -> int:
        """The bytes that a live allocation occupies (rounded up).

        Raises:
            UsageError: no live allocation begins at `offset`.
        """
        size = self._live.get(offset)
        if size is None:
            raise UsageError(f"no allocation begins at offset {offset}")
        return size

    def check_integrity(self) -> None:
        """Assert that live and free ranges tile the capacity, with no two free neighbours."""
        ranges = [(offset, size, True) for offset, size in self._live.items()]
        ranges += [(offset, size, False) for offset, size in self._free_size.items()]
        ranges.sort()
        end, live_bytes, after_free = 0, 0, False
        for offset, size, live in ranges:
            assert offset == end, f"overlap or gap: [{end}, {offset})"
            assert size > 0
            assert size % self.alignment == 0, f"size {size} at {offset} is not aligned"
            assert live or not after_free, f"free neighbours not joined at {offset}"
            end, after_free = offset + size, not live
            live_bytes += size if live else 0
        assert end == self.capacity_bytes, f"{end} bytes tiled of {self.capacity_bytes}"
        assert live_bytes == self._allocated_bytes
        assert self._sizes == sorted(self._bins)
        binned = {offset: size for size, bin_ in self._bins.items() for offset in bin_}
        assert binned == self._free_size
        ends = {offset + size: offset for offset, size in self._free_size.items()}
        assert ends == self._free_at_end

    def _add_free(self, offset: int, size: int) -> None:
        self._free_size[offset] = size
        self._free_at_end[offset + size] = offset
        offsets = self._bins.get(size)
        if offsets is None:
            self._bins[size] = {offset: None}
            insort(self._sizes, size)
        else:
            offsets[offset] = None

    def _remove_free(self, offset: int, size: int) -> None:
        del self._free_size[offset]
        del self._free_at_end[offset + size]
        offsets = self._bins[size]
        del offsets[offset]
        if not offsets:
            del self._bins[size]
            del self._sizes[bisect_left(self._sizes, size)]


class PoolMapping:
    """A pool mapped into this process, readable and writable.

    Views and arrays are windows on shared memory: other processes may change the bytes under
    them, and a lease or a reservation is what keeps them still. They keep the map alive: after
    `close` the memory is unmapped when the last of them is gone, and freed when the last
    process that holds the pool is gone.

    `address` must not be used after `close`.
    """

    @classmethod
    def attach(cls, fd: int, capacity_bytes: int) -> PoolMapping:
        """Map a pool whose descriptor came over a socket.

        The descriptor is duplicated: the caller closes its own at any time.

        Raises:
            UsageError: `capacity_bytes` is not positive.
            Incompatible: `fd` is not a pool: not sealed against shrinking (a read could then
                kill the process), or smaller than `capacity_bytes`.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise Incompatible(f"descriptor {fd} is not a pool: {error}") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            raise Incompatible(f"descriptor {fd} is not a pool: it can still shrink")
        size = os.fstat(fd).st_size
        if size < capacity_bytes:
            raise Incompatible(f"the pool has {size} bytes, {capacity_bytes} were announced")
        return PoolMapping(fd, capacity_bytes)

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise UsageError(f"cannot map {capacity_bytes} bytes")
        try:
            memory = mapping.map_shared(fd, capacity_bytes)
        except OSError as error:
            raise TierUnavailable(f"cannot map {capacity_bytes} bytes: {error}") from error
        self._array: npt.NDArray[np.uint8] | None = np.frombuffer(memory, np.uint8)
        self._capacity_bytes = capacity_bytes
        self._address = int(self._array.ctypes.data)
        self._populated_bytes = 0
        self._populating: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def address(self) -> int:
        """Where the map begins in this process, for ctypes and for pinned registration."""
        self._open_array()
        return self._address

    @property
    def populated_bytes(self) -> int:
        """How many bytes `populate` has faulted in so far, from the lowest address."""
        return self._populated_bytes

    @property
    def closed(self) -> bool:
        return self._array is None

    def array(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """`nbytes` bytes from `offset`, as a writable uint8 array (no copy).

        Raises:
            UsageError: the range leaves the pool, or the mapping is closed.
        """
        array = self._open_array()
        if offset < 0 or nbytes < 0 or offset + nbytes > self._capacity_bytes:
            raise UsageError(
                f"[{offset}, {offset + nbytes}) is outside the pool of {self._capacity_bytes}"
            )
        return array[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` bytes from `offset`, as a writable memoryview of bytes (no copy).

        Raises:
            UsageError: the range leaves the pool, or the mapping is closed.
        """
        return self.array(offset, nbytes).data

    def populate(self, in_background: bool = True) -> None:
        """Fault the pool in, lowest addresses first, so that no copy pays for first touches.

        In the background a thread does it without the interpreter lock and ends at `close`; a
        second call does nothing. It gives up silently where the kernel cannot (before Linux
        5.14) or memory runs short: `populated_bytes` tells how far it came.
        """
        self._open_array()
        if self._populating is not None or self._populated_bytes:
            return
        if not in_background:
            self._populate()
            return
        self._populating = threading.Thread(
            target=self._populate, name="kvstrata-populate", daemon=True
        )
        self._populating.start()

    def _populate(self) -> None:
        while self._populated_bytes < self._capacity_bytes and not self._stop.is_set():
            begin = self._populated_bytes
            piece = min(_POPULATE_PIECE, self._capacity_bytes - begin)
            if not self._populate_piece(self._address + begin, piece):
                return
            self._populated_bytes = begin + piece

    def _populate_piece(self, address: int, nbytes: int) -> bool:
        return mapping.populate(address, nbytes)

    def close(self) -> None:
        """Let go of the memory. Repeatable, never raises; views that still exist stay valid."""
        self._stop.set()
        if self._populating is not None:
            self._populating.join()
        self._array = None  # the map goes with the last view

    def _open_array(self) -> npt.NDArray[np.uint8]:
        if self._array is None:
            raise UsageError("the pool mapping is closed")
        return self._array


class Pool(PoolMapping):
    """The node's pool: an anonymous shared file, sealed so that it can never change its size.

    `fd` goes to clients with `socket.send_fds`. It is not inherited by programs that are
    started, and it is closed with the pool.
    """

    @classmethod
    def create(cls, capacity_bytes: int, name: str = "kvstrata") -> Pool:
        """Make a pool of `capacity_bytes`, rounded down to a multiple of 4096.

        No memory is taken yet: pages come at first touch, or with `populate`.

        Raises:
            UsageError: the capacity is below 4096.
            TierUnavailable: the system gives no such memory.
        """
        capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        if capacity_bytes <= 0:
            raise UsageError(f"a pool needs at least {ALIGNMENT} bytes")
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise TierUnavailable(f"cannot make a pool: {error}") from error
        try:
            os.ftruncate(fd, capacity_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, capacity_bytes)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise TierUnavailable(f"no pool of {capacity_bytes} bytes: {error}") from error
        except TierUnavailable:
            os.close(fd)
            raise

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        super().__init__(fd, capacity_bytes)
        self._fd = fd

    def _populate_piece(self, address: int, nbytes: int) -> bool:
        # The node decides what pages the pool has, and its clients map those. Where the kernel
        # gives no huge page, small ones do.
        if nbytes == mapping.HUGE_BYTES and mapping.populate(address, ALIGNMENT):
            mapping.collapse(address)
        return mapping.populate(address, nbytes)

    @property
    def fd(self) -> int:
        """The descriptor to send to clients.

        Raises:
            UsageError: the pool is closed.
        """
        self._open_array()
        return self._fd

    def close(self) -> None:
        """Let go of the memory and the descriptor. Repeatable, never raises."""
        super().close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be used now: the machine's, bounded by every enclosing cgroup.

    File cache that the kernel would give back counts as available, in both.

    Args:
        root: where `proc` and `sys` are found; another folder in tests.
    """
    return min([_meminfo(root, "MemAvailable"), *(left for _, left in _cgroup_limits(root))])


def total_bytes(root: Path = Path("/")) -> int:
    """Memory that exists for this process: the machine's, bounded by every enclosing cgroup."""
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _ in _cgroup_limits(root))])


def _meminfo(root: Path, field: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise TierUnavailable(f"/proc/meminfo has no {field}")


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) in bytes of every cgroup around this process that has one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            cache = "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's; then only the mount's own root exists here.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit = _read_number(group / names[0])
            if limit is not None:
                used = _read_number(group / names[1]) or 0
                yield limit, max(0, limit - used + _read_stat(group / "memory.stat", cache))
            if group == mount:
                break


def _read_number(file: Path) -> int | None:
    """The number in a file; None if the file is missing or says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _read_stat(file: Path, field: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(n) for name, n in (line.split() for line in lines) if name == field), 0)
