"""What the doctor checks without moving a byte of KV: one function a question, one `Check` each."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvstrata import __version__
from kvstrata.cli.counting import troubles
from kvstrata.errors import ConfigError
from kvstrata.units import approximate_size

if TYPE_CHECKING:
    from kvstrata.config import Config, DiskConfig
    from kvstrata.wire.protocol import Hello

SMALL_POOL_BYTES = 512 << 20
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "lustre")


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, and in words why."""

    name: str
    result: Literal["ok", "warn", "FAIL"]
    message: str
    measured: Mapping[str, float] = field(default_factory=dict)


def check_secret(config: Config, hello: Hello | None) -> Check:
    """The deployment's secret: private, whole, and the one that the node has."""
    from kvstrata.secret import load_secrets, secret_check

    file = config.secret_file
    try:
        there = bool(file.stat())
    except FileNotFoundError:
        there = False
    except OSError:
        there = True  # `load_secrets` says what is the matter
    if not there and hello is None:
        return Check("secret", "ok", f"{file} is not there yet; the first node makes it")
    if not there:
        return Check(
            "secret",
            "warn",
            f"{file} is not there, though the node has a secret: it was started with another "
            "secret_file, or the file was removed, and then what is stored is lost at a restart",
        )
    try:
        known = load_secrets(file)
        if hello is not None and list(known) != hello.secrets:
            common = any(secret in known for secret in hello.secrets)
            return Check(
                "secret",
                "warn",
                f"{file} was changed since the node started; restart the node"
                if common
                else f"the node has another secret than {file}: it was started with another file "
                "or before this one changed, and finds nothing that was stored under this one",
            )
    except ConfigError as error:
        return Check("secret", "FAIL", error.problem + f" ({file})")
    two = ""
    if len(known) > 1:
        used, other = map(secret_check, known)
        two = f"; two are known: stores use {used}, lookups {other}, too"
    return Check("secret", "ok", f"{file}, for this user only{two}")


def check_socket(path: Path) -> Check:
    """The socket: ours, and nobody else's."""
    try:
        status, folder = path.stat(), path.parent.stat()
    except OSError as error:
        return Check("socket", "FAIL", f"{path}: {error.strerror}")
    if status.st_uid != os.getuid():
        return Check(
            "socket",
            "FAIL" if os.getuid() else "warn",
            f"{path} belongs to user {status.st_uid}, you are {os.getuid()}: a node serves its own "
            "user and root, so run engines and node as one user",
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        return Check(
            "socket",
            "warn",
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, expected 0600: chmod 600 {path}",
        )
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        return Check(
            "socket", "warn", f"others may replace it: chmod go-w {path.parent}, or move it"
        )
    return Check("socket", "ok", f"unix:{path}, for this user only")


def check_release(hello: Hello) -> Check:
    """Both sides of the socket run one release."""
    if hello.release != __version__:
        return Check(
            "version",
            "warn",
            f"the node runs KVStrata {hello.release}, this is {__version__}: they speak one "
            "protocol; restart the node to have one release on both sides",
        )
    return Check("version", "ok", f"KVStrata {__version__} on both sides")


def check_host(state: Mapping[str, Any], available_bytes: int) -> Check:
    """The pool is of a useful size, and the machine has the memory it was promised."""
    capacity, populated = state["host"]["capacity_bytes"], state["host"]["populated_bytes"]
    size = approximate_size(capacity)
    missing = capacity - populated
    if missing > available_bytes:
        return Check(
            "host memory",
            "warn",
            f"memory runs short: {approximate_size(missing)} of the pool's {size} are still to be "
            f"taken, {approximate_size(available_bytes)} are available; the system may end the "
            "node. Lower host.capacity",
        )
    if capacity < SMALL_POOL_BYTES:
        return Check(
            "host memory",
            "warn",
            f"the pool has only {size}: 3,000 tokens of an 8B model take about 370MiB, so little "
            "will still be there when it is asked for again. Raise host.capacity",
        )
    leased = state["leases"]["bytes"]
    if leased > capacity // 2:
        return Check(
            "host memory",
            "warn",
            f"{approximate_size(leased)} of the pool's {size} are leased by loads that wait or "
            "run: matches are cut short. Raise host.capacity",
        )
    return Check("host memory", "ok", f"{size}, {approximate_size(available_bytes)} more available")


def check_tier(tier: Mapping[str, Any]) -> Check:
    """A slower tier's own word for how it is."""
    name, how = str(tier["name"]), str(tier["state"])
    if tier.get("shared"):
        return _check_shared(name, how, tier)
    kept = f"{tier['num_objects']} objects, {approximate_size(tier['used_bytes'])} of " + (
        approximate_size(tier["capacity_bytes"])
    )
    if how == "ok":
        return Check(name, "ok", kept)
    if how == "scanning":
        return Check(name, "warn", f"still scanning what earlier nodes left; {kept} found so far")
    if how.startswith("read only"):
        return Check(name, "warn", f"{how}; what it holds ({kept}) still hits")
    return Check(name, "FAIL", f"{how}; it is tried again within a minute")


def _check_shared(name: str, how: str, tier: Mapping[str, Any]) -> Check:
    """The same of one that a fleet shares, whose contents nobody knows."""
    if how == "ok":
        if "epoch" not in tier:
            return Check(name, "ok", "answers")
        same = "the same on every node that shares it"
        return Check(name, "ok", f"answers; epoch {tier['epoch']}: {same}")
    if how.startswith("read only"):
        return Check(name, "warn", f"{how}; what the store has still hits")
    return Check(name, "FAIL", f"{how}; it is asked again within a minute")


def check_left_out(name: str, why: str) -> Check:
    """The node could not open a tier."""
    if "held by" in why:
        why += "; a folder belongs to one node: join that one, stop it, or name another folder"
    return Check(name, "FAIL", f"the tier is off since the node started: {why}")


def check_folder(disk: DiskConfig, used_bytes: int) -> Check:
    """The disk tier's folder is on a disk, with the room that it was promised."""
    from kvstrata.tiers.disk.folder import file_system_of

    if trouble := folder_trouble(disk.path):
        return Check("disk folder", "FAIL", trouble)
    kind = file_system_of(disk.path)
    free = os.statvfs(disk.path).f_bavail * os.statvfs(disk.path).f_frsize
    where = f"{disk.path} on {kind or 'an unknown file system'}"
    if kind in MEMORY_FILE_SYSTEMS:
        return Check(
            "disk folder",
            "warn",
            f"{where}, which is memory: it takes what the pool could have, and a restart of the "
            "machine empties it. Name a folder on a disk",
        )
    if kind in NETWORK_FILE_SYSTEMS:
        return Check(
            "disk folder",
            "warn",
            f"{where}, which is a network: when it hangs, so do the tier's threads (the node "
            "serves on without the tier). Prefer a local disk",
        )
    if free < disk.capacity - used_bytes:
        return Check(
            "disk folder",
            "warn",
            f"{where} has {approximate_size(free)} free, but the tier may grow by "
            f"{approximate_size(disk.capacity - used_bytes)}: it will turn read only. Lower "
            "disk.capacity, or make room",
        )
    return Check("disk folder", "ok", f"{where}, {approximate_size(free)} free")


def folder_trouble(folder: Path) -> str:
    """Why a node cannot use a folder for its disk tier, in words; empty if it can."""
    if not os.path.exists(folder):
        return f"the folder {folder} does not exist"
    if not os.path.isdir(folder):
        return f"{folder} is no folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written by user {os.getuid()}, or lies on a read-only mount"
    return ""


def check_past(counters: Mapping[str, float]) -> Check:
    """What went wrong since the node started, by its counters."""
    if found := troubles(counters):
        return Check("so far", "warn", "since the node started: " + "; ".join(found))
    return Check("so far", "ok", "nothing has gone wrong since the node started")
