"""Where a node's socket is: where the configuration says, or at a path that follows from it."""

from __future__ import annotations

import os
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


def _owner(folder: Path) -> int | None:
    """Who owns a folder; None if nothing is there, -1 if it is something else (a link too)."""
    try:
        found = folder.lstat()
    except OSError:
        return None
    return found.st_uid if stat.S_ISDIR(found.st_mode) else -1
