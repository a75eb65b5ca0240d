"""Shared memory at addresses that huge pages can have, through Linux's own calls.

Python's ``mmap`` takes no address. A huge page needs address and file offset to be equal modulo
2 MiB; one that is physically contiguous is read from disk and copied in fewer, longer pieces.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

HUGE_BYTES = 2 << 20

# Linux numbers; `mmap` exposes none of them before Python 3.14.
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the interpreter lock
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_shared(fd: int, nbytes: int) -> memoryview:
    """Map the first ``nbytes`` bytes of a file, readable and writable, aligned to 2 MiB.

    The memory is unmapped when the last view of it is gone.

    Raises:
        OSError: the system refuses.
    """
    spare = nbytes + HUGE_BYTES
    reserved = _map(None, spare, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-reserved // HUGE_BYTES) * HUGE_BYTES
    try:
        _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except BaseException:
        _libc.munmap(reserved, spare)
        raise
    end = address + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    _libc.munmap(end, reserved + spare - end)
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    # Not at the interpreter's exit: threads may still copy then, and the kernel unmaps it anyway.
    weakref.finalize(memory, _libc.munmap, address, end - address).atexit = False
    return memoryview(memory).cast("B")


def populate(address: int, nbytes: int) -> bool:
    """Fault pages in, writable; False where the kernel cannot (before Linux 5.14) or has none."""
    while _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) != 0:
        if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
            return False
    return True


def collapse(address: int) -> bool:
    """Make one huge page of the 2 MiB from here, of which one page at least is there.

    False where the kernel cannot (before Linux 6.1) or finds none; nothing has changed then.
    """
    return bool(_libc.madvise(address, HUGE_BYTES, _MADV_COLLAPSE) == 0)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
