"""``kvstrata serve``: a node as a service, in the foreground, as systemd and containers want it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import configured
from kvstrata.errors import ConfigError, NodeUnavailable

if TYPE_CHECKING:
    from kvstrata.config import Config


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--socket",
            "--node",
            metavar="unix:/PATH",
            help="Where to listen; engines name the same in their `node` option.",
        ),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(
            "--api",
            metavar="ADDRESS",
            help="Also run the HTTP API here, such as 127.0.0.1:7780 or unix:/PATH.",
        ),
    ] = None,
) -> None:
    """Run a node in the foreground until SIGTERM or ctrl-C.

    Prints the effective configuration, then "serving on ..." once engines can connect. On a
    signal it writes behind what is still queued (10 s at most) and ends with exit status 0.
    The log goes to stderr. Under systemd use Type=notify, or Type=exec.

    Without --socket the node listens where an on-demand node of this user and configuration
    would: engines with the same options and no `node` of their own find it.

    With --api, or `api.listen` in the configuration, the HTTP API runs beside it as a process of
    its own (docs/api.md) and ends with it. Engines need not know of it.
    """
    from kvstrata.config import effective, host_capacity_bytes
    from kvstrata.memory.machine import available_bytes
    from kvstrata.node.process.run import run
    from kvstrata.units import approximate_size
    from kvstrata.wire.sockets import prepare_folder, socket_path

    given = [*(settings or []), *([f"api.listen={api}"] if api else [])]
    config = configured(config_file, given, at)
    path = socket_path(config)
    typer.echo(effective(config))
    logging.basicConfig(
        level=config.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    available = available_bytes()
    capacity = host_capacity_bytes(config, available)
    if capacity > available:
        logging.getLogger(__name__).warning(
            "host.capacity is %s, but only %s of memory is available now: the pool fills in the "
            "background, and the system may end the node when memory runs out",
            approximate_size(capacity),
            approximate_size(available),
        )
    ready = False

    def on_ready() -> None:
        nonlocal ready
        ready = True
        typer.echo(f"serving on unix:{path} (pid {os.getpid()}, {approximate_size(capacity)})")
        notify("READY=1")

    try:
        prepare_folder(path.parent)
        wait_for_turn(config, path)
        run(config, on_ready=on_ready, on_api=lambda url: typer.echo(f"API on {url}"))
    except OSError as error:
        if ready:  # not about how the node was set up: a bug's trace must be seen
            raise
        raise ConfigError("node", f"cannot start a node on {path}: {error}") from error
    typer.echo("drained, and ended")


def wait_for_turn(config: Config, path: Path) -> None:
    """Return when no other node uses this socket; one that is ending is waited for.

    Raises:
        ConfigError: a node listens there and means to stay.
    """
    from kvstrata.cli.join import join
    from kvstrata.wire.sockets import beside

    with open(beside(path, ".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        try:
            client = join(config)
        except NodeUnavailable:
            typer.echo(f"waiting: an earlier node on {path} is still writing to its tiers")
            fcntl.flock(lock, fcntl.LOCK_EX)
            return
        hello = client.hello
        client.close()
        raise ConfigError(
            "node",
            f"a node already listens on {path}: pid {hello.pid}, KVStrata {hello.release}; stop it "
            f"(kill {hello.pid}), or give this one another socket with --socket unix:/path",
        )


def notify(state: str) -> None:
    """Tell systemd about this service, where it asked to be told (sd_notify's protocol)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall(state.encode())
