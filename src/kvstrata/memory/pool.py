"""The pool: one region of shared memory.

`Pool` is a sealed memfd that the node makes; `PoolMapping` is the same memory seen by a
client that received the descriptor.
"""

from __future__ import annotations

import fcntl
import os
import threading

import numpy as np
import numpy.typing as npt

from kvstrata.errors import Incompatible, TierUnavailable, UsageError
from kvstrata.memory import mapping
from kvstrata.memory.allocator import ALIGNMENT

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# The kernel holds the address space's lock for one whole madvise call, and whatever else the
# process maps or unmaps meanwhile waits. 2 MiB keeps that wait to a few milliseconds even where
# memory is slow to come, and costs no throughput.
_POPULATE_PIECE = mapping.HUGE_BYTES


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
