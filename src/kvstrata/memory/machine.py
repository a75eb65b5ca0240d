"""How much memory there is, and how much of it can be taken: control groups included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvstrata.errors import TierUnavailable


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
