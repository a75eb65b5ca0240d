"""Where a node's socket is, and what may be done there.

It is where the configuration says, or at a path that follows from it. Nothing is ever removed from
there but a dead socket of our own.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from kvstrata.config import Config, kinds
from kvstrata.errors import ConfigError
from kvstrata.wire.protocol import PROTOCOL_VERSION


def socket_path(
    config: Config,
    environ: Mapping[str, str] | None = None,
    *,
    uid: int | None = None,
    temporary: Path = Path("/tmp"),
) -> Path:
    """The node's socket: the one that is configured, or one derived from `node_identity`.

    That lies in ``$XDG_RUNTIME_DIR/kvstrata`` where the folder is there and ours, else in
    ``/tmp/kvstrata-<uid>``. Nothing is created.

    Raises:
        ConfigError: the folder is somebody else's, who could then pose as the node.
    """
    if config.node != "auto":
        return Path(config.node.removeprefix("unix:"))
    uid = os.getuid() if uid is None else uid
    # Nodes and clients of two releases do not meet by chance where they could not talk.
    name = f"{config.node_identity(uid)}-{PROTOCOL_VERSION}.sock"
    runtime = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and _owner(Path(runtime)) == uid:
        path = Path(runtime) / "kvstrata" / name
        if len(os.fsencode(path)) <= kinds.MAX_SOCKET_PATH:
            return path
    folder = temporary / f"kvstrata-{uid}"
    if _owner(folder) not in (None, uid):
        raise ConfigError("node", f"{folder} is not a folder of user {uid}; remove it")
    return folder / name


def prepare_folder(folder: Path) -> None:
    """Make the socket's folder, for this user only.

    Raises:
        ConfigError: it belongs to somebody else or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ConfigError("node", f"cannot make the folder {folder}: {error}") from error
    if owner not in (os.getuid(), 0):
        raise ConfigError("node", f"{folder} belongs to user {owner}; name another socket")


def beside(path: Path, ending: str) -> Path:
    """A file that goes with a socket: of its whole name, so that no two sockets share one."""
    return path.with_name(path.name + ending)


def remove_dead(path: Path) -> None:
    """Remove the socket of a node that has died; nothing else.

    Raises:
        ConfigError: what is there is no socket, somebody else's, or listened on; it stays.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(
            "node", f"{path} is there and is no socket: it is left alone; name another"
        )
    if found.st_uid != os.getuid():
        raise ConfigError("node", f"{path} is a socket of user {found.st_uid}; name another")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full, so it lives
    raise ConfigError("node", f"somebody listens on {path}; stop that, or name another socket")


def _owner(folder: Path) -> int | None:
    """Who owns a folder; None if nothing is there, -1 if it is something else (a link too)."""
    try:
        found = folder.lstat()
    except OSError:
        return None
    return found.st_uid if stat.S_ISDIR(found.st_mode) else -1
