"""How a command comes to a node that already runs: it joins one, and never starts one."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kvstrata.cli.config import read_config
from kvstrata.cli.plain import echo
from kvstrata.errors import DeadlineExceeded, NodeUnavailable

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.wire.client import NodeClient

NodeOption = Annotated[
    str | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="unix:/path of a service, or auto; before the configuration's `node`.",
    ),
]


def configured(file: Path | None, settings: list[str] | None, node: str | None) -> Config:
    """The configuration that ``--config``, ``--set`` and ``--node`` name.

    Raises:
        ConfigError: as `read_config`.
    """
    return read_config(file, [*(settings or []), *([f"node={node}"] if node else [])])


def join(config: Config) -> NodeClient:
    """A client of the node that runs with this configuration.

    Raises:
        NodeUnavailable: there is none; the message names others that this user could mean.
        Incompatible: it speaks another protocol version.
        ConfigError: the socket's folder belongs to somebody else.
    """
    from kvstrata.wire.launch import connect
    from kvstrata.wire.sockets import socket_path

    path = socket_path(config)
    try:
        return connect(replace(config, node=f"unix:{path}"))
    except NodeUnavailable as error:
        raise NodeUnavailable(f"{error}{_instead(path)}") from error


def join_or_exit(config: Config) -> NodeClient:
    """`join`, but without a node one line on stderr and exit status 1."""
    try:
        return join(config)
    except (NodeUnavailable, DeadlineExceeded) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Print the error in one line on stderr and end with exit status 1."""
    echo(f"kvstrata: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(1)


def listening_nodes(folder: Path) -> list[Path]:
    """The sockets in a folder behind which somebody listens."""
    found = []
    for path in sorted(folder.glob("*.sock")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(os.fspath(path))
            found.append(path)
    return found


def _instead(path: Path) -> str:
    """The nodes that were started with another configuration, as words to append."""
    others = [f"--node unix:{other}" for other in listening_nodes(path.parent) if other != path]
    return f"; another one does: {' or '.join(others)}" if others else ""
