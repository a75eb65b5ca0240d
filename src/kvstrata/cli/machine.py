"""What the doctor looks at on the machine: the node's limits, huge pages, the disk's drive."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.cli.checks import Check
from kvstrata.memory import mapping
from kvstrata.units import approximate_size

if TYPE_CHECKING:
    from kvstrata.config import Config

FEW_DESCRIPTORS = 1024
UNLIMITED = 1 << 63
LOOK_BYTES = 16 << 20
LOOK_STEP_BYTES = 4 << 20
SLOW_BYTES_PER_S = 200e6
THP = Path("/sys/kernel/mm/transparent_hugepage")


def limit_of(pid: int, name: str) -> int:
    """A process's soft limit, as ``/proc/PID/limits`` calls it; `UNLIMITED` where it has none.

    Raises:
        OSError: there is no such process, or it is not ours to look at.
    """
    for line in Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            soft = line[len(name) :].split()[0]
            return UNLIMITED if soft == "unlimited" else int(soft)
    raise OSError(errno.ENOENT, f"no limit is called {name!r}")


def check_limits(pid: int, config: Config, capacity_bytes: int) -> Iterator[Check]:
    """What the system lets the node open and lock.

    Args:
        pid: the node's.
        config: what it was configured with.
        capacity_bytes: of its pool.
    """
    try:
        yield _check_descriptors(pid)
        if user := _registers(config):
            yield _check_locked(pid, user, capacity_bytes)
    except OSError as error:
        yield Check("limits", "warn", f"process {pid} cannot be looked at: {error.strerror}")


def _check_descriptors(pid: int) -> Check:
    limit, used = limit_of(pid, "Max open files"), len(os.listdir(f"/proc/{pid}/fd"))
    words = f"{used} of {limit if limit < UNLIMITED else 'any number of'} files open"
    if limit < FEW_DESCRIPTORS or used > limit * 3 // 4:
        return Check(
            "descriptors",
            "warn",
            f"{words}: each client, peer and file under way takes one, and without any left the "
            "node refuses clients. Raise it: LimitNOFILE=65536 in the unit, or ulimit -n 65536 "
            "before `kvstrata serve`",
            {"open": used, "limit": limit},
        )
    return Check("descriptors", "ok", words, {"open": used, "limit": limit})


def _registers(config: Config) -> str:
    """The option by which the node registers its pool with a network card; empty: none does."""
    from kvstrata.config.mooncake import MooncakeConfig

    if config.network.transport == "nixl":
        return "network.transport = nixl"
    if any(isinstance(part, MooncakeConfig) and part.protocol == "rdma" for part in config.tiers):
        return "mooncake.protocol = rdma"
    return ""


def _check_locked(pid: int, user: str, capacity_bytes: int) -> Check:
    limit = limit_of(pid, "Max locked memory")
    if limit < capacity_bytes:
        return Check(
            "locked memory",
            "warn",
            f"{user} registers the pool ({approximate_size(capacity_bytes)}) with the network "
            f"card, but the node may lock {approximate_size(limit)} only: RDMA fails, or goes "
            "another way. Raise it: LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited",
        )
    return Check("locked memory", "ok", f"enough for all of the pool, as {user} wants it")


def check_huge_pages() -> Check:
    """Whether the kernel makes huge pages of a pool: tried with one of 2 MiB."""
    file = os.memfd_create("kvstrata-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, mapping.HUGE_BYTES)
        memory = mapping.map_shared(file, mapping.HUGE_BYTES)
    finally:
        os.close(file)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
    if mapping.populate(address, mmap.PAGESIZE) and mapping.collapse(address):
        return Check("huge pages", "ok", "the kernel gives them to the pool")
    return Check(
        "huge pages",
        "warn",
        "the kernel gives none, so a disk fills the pool about half as fast. It takes Linux 6.1 "
        f"(this is {os.uname().release}), {THP}/shmem_enabled not at deny, memory that is not "
        "split into small pieces, and a process that has them not switched off (prctl)",
    )


def check_drive(folder: Path, clock: Callable[[], float] = time.perf_counter) -> Check:
    """How a disk tier's drive writes and reads past the page cache, by 16 MiB in a nameless file.

    Args:
        folder: on the drive; nothing stays in it.
        clock: seconds, as they pass.
    """
    name = "disk drive"
    try:
        file, direct = _open_nameless(folder)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return Check(name, "ok", "not looked at: its file system has no files without a name")
        return Check(name, "FAIL", f"no file can be made in {folder}: {_why(error)}")
    try:
        written, read = _write_and_read(file, clock)
    except OSError as error:
        return Check(
            name,
            "FAIL",
            f"{folder} did not take {approximate_size(LOOK_BYTES)}: {_why(error)}",
        )
    finally:
        os.close(file)
    speeds = {"write_gb_per_s": written / 1e9, "read_gb_per_s": read / 1e9}
    words = f"writes {written / 1e9:.1f} GB/s, reads {read / 1e9:.1f} GB/s"
    if not direct:
        return Check(
            name,
            "warn",
            f"{words} through the page cache, since its file system takes no O_DIRECT: what the "
            "tier reads and writes takes memory twice. Prefer ext4 or XFS on a local disk",
            speeds,
        )
    if min(written, read) < SLOW_BYTES_PER_S:
        return Check(
            name,
            "warn",
            f"{words}: so slow that computing may be sooner, and then the planner leaves what is "
            "there to the engine. Name a folder on an NVMe drive, or see what else uses this one",
            speeds,
        )
    return Check(name, "ok", f"{words}, past the page cache", speeds)


def _open_nameless(folder: Path) -> tuple[int, bool]:
    """A file that goes when it is closed, and whether it passes the page cache by."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(folder, flags, 0o600), False


def _write_and_read(file: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Bytes a second of writing and of reading back."""
    offsets = range(0, LOOK_BYTES, LOOK_STEP_BYTES)
    with mmap.mmap(-1, LOOK_STEP_BYTES) as step:
        step.write(os.urandom(LOOK_STEP_BYTES))
        began = clock()
        for offset in offsets:
            if os.pwritev(file, [step], offset) != LOOK_STEP_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wrote = clock()
        for offset in offsets:
            os.preadv(file, [step], offset)
        ended = clock()
    return LOOK_BYTES / max(wrote - began, 1e-9), LOOK_BYTES / max(ended - wrote, 1e-9)


def _why(error: OSError) -> str:
    advice = {
        errno.ENOSPC: "make room, or lower disk.capacity",
        errno.EDQUOT: "the user's quota is used up: raise it, or lower disk.capacity",
        errno.EFBIG: "a limit on the size of files (ulimit -f) holds: lift it for the node, too",
        errno.EROFS: "it is mounted read-only: see dmesg for why, and mount it again",
        errno.EIO: "the drive fails: see dmesg, and smartctl -a of the device",
    }.get(error.errno or 0, "see dmesg")
    return f"{error.strerror}; {advice}"


def check_quarantine(folder: Path) -> Check:
    """Whether the disk tier has put away what failed its checksum."""
    files = sorted((folder / "quarantine").glob("*"), key=lambda file: file.lstat().st_mtime)
    if not files:
        return Check("quarantine", "ok", "empty: nothing on the disk failed its checksum")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(files[-1].lstat().st_mtime))
    return Check(
        "quarantine",
        "warn",
        f"{len(files)} objects in {folder / 'quarantine'} were not what had been stored, the last "
        f"one of {when}: a failing drive or memory, or somebody changed them. See dmesg and "
        "smartctl, run `kvstrata scrub disk`, and delete them when you have looked",
    )
