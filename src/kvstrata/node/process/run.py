"""The node as a process: binds its socket, runs the loop, and ends when it should.

``python -m kvstrata.node.process.run`` reads its configuration as JSON from standard input; that
is how a client starts a node on demand. ``kvstrata serve`` calls `run` itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from kvstrata.config import Config, load_config
from kvstrata.cores import given_cores
from kvstrata.errors import KVStrataError
from kvstrata.node.fleet.membership import Membership
from kvstrata.node.node import Node
from kvstrata.node.process.companion import Companion
from kvstrata.node.process.listening import PeerServer
from kvstrata.node.process.server import Server
from kvstrata.secret import Secrets, load_secrets
from kvstrata.tiers.journal import FileJournal
from kvstrata.wire.sockets import beside, prepare_folder, remove_dead, socket_path

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
COLLECT_EVERY = (200, 1, 2_500_000)
"""Young objects a few at a time, since a look at them holds the loop; all objects hardly ever."""
# Who starts a node on demand connects as soon as it listens.
STARTUP_GRACE_S = 60.0


def run(
    config: Config,
    *,
    on_demand: bool = False,
    on_ready: Callable[[], None] = lambda: None,
    on_api: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT; on demand, also until nobody has been connected for a while.

    Args:
        config: the whole configuration.
        on_demand: end ``config.linger`` seconds after the last client.
        on_ready: called once clients can connect.
        on_api: called with the HTTP API's URL, where one is configured. A service does not serve
            without it; an on-demand node does, and logs why.

    Raises:
        ConfigError: the socket's folder or the secret cannot be used, or the API cannot start.
        TierUnavailable: the system gives no memory for the pool.
    """
    path = socket_path(config)
    known = load_secrets(config.secret_file)
    # A thread that computes gives the loop its turn within this time, not within 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # A walk over a million indexed objects would stall every client; cycles are few and young.
    gc.set_threshold(*COLLECT_EVERY)
    prepare_folder(path.parent)
    with open(beside(path, ".lock"), "a") as lock:
        # An earlier node that is still writing behind holds this, and the disk tier's folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        uvloop.run(_serve(config, path, known, on_demand, on_ready, on_api))


def bind(path: Path) -> socket.socket:
    """A listening Unix socket of mode 0600, in the place of a dead one.

    Raises:
        ConfigError: something else is there, which is left as it is.
    """
    remove_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


class _Door:
    """The socket in the file system, and on demand the wish to close it for good.

    Args:
        path: of the socket.
        linger_s: how long to wait for another client after the last; None for ever.
    """

    def __init__(self, path: Path, linger_s: float | None) -> None:
        self.closed = asyncio.Event()
        self.server: Server | None = None
        self._path = path
        self._linger_s = linger_s
        self._ours: os.stat_result | None = None
        self._leaving: asyncio.TimerHandle | None = None

    def open(self, server: Server) -> None:
        """Let clients in."""
        self.server = server
        server.listen(bind(self._path))
        self._ours = self._path.lstat()
        if self._linger_s is not None:
            self._leave_in(STARTUP_GRACE_S)

    def on_alone(self) -> None:
        """The last client has gone."""
        if self._linger_s is not None and not self.closed.is_set():
            self._leave_in(self._linger_s)

    def close(self) -> None:
        """Let nobody in any more: who comes now starts a new node, which waits for our lock."""
        self.closed.set()
        with contextlib.suppress(FileNotFoundError):
            # Whoever put something else in its place meanwhile keeps that.
            if self._ours is not None and os.path.samestat(self._ours, self._path.lstat()):
                self._path.unlink()
        if self.server is not None:
            self.server.stop_listening()

    def _leave_in(self, seconds: float) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        self._leaving = asyncio.get_running_loop().call_later(seconds, self._leave_if_alone)

    def _leave_if_alone(self) -> None:
        assert self.server is not None
        self.server.accept()
        if not self.server.num_clients:
            self.close()


async def _serve(
    config: Config,
    path: Path,
    known: Secrets,
    on_demand: bool,
    on_ready: Callable[[], None],
    on_api: Callable[[str], None],
) -> None:
    door = _Door(path, config.linger if on_demand else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, door.close)
    node = Node.create(config, journal=FileJournal(str(beside(path, ".journal"))))
    node.operations.drainer.end = door.close
    server = Server(node, known, door.on_alone)
    peers = None
    fleet = Membership.of(node, path)
    companion = Companion(config, path, server.beside.add)
    starting: asyncio.Future[None] | None = None
    try:
        peers = PeerServer.of(config, known, node)
        await node.start()
        if fleet is not None:
            await fleet.start()
        door.open(server)
        logger.info(
            "node %d serves on %s: %d bytes of host memory", os.getpid(), path,
            node.host.pool.capacity_bytes,
        )  # fmt: skip
        if config.api.listen is not None:
            if on_demand:
                starting = asyncio.ensure_future(_start_if_it_can(companion))
            else:
                on_api(await companion.start())
        on_ready()
        await door.closed.wait()
    finally:
        door.close()
        if fleet is not None:
            await fleet.stop()
        if starting is not None:
            starting.cancel()
            await asyncio.wait({starting})
        await companion.close()
        await server.close()
        if peers is not None:
            await peers.close()
        await node.stop()
        logger.info("node %d has ended", os.getpid())


async def _start_if_it_can(companion: Companion) -> None:
    try:
        logger.info("the API of this node is on %s", await companion.start())
    except (KVStrataError, OSError) as error:
        logger.error("this node has no API: %s", error)


def _main() -> None:
    try:
        config = load_config(environ={}, overrides=json.load(sys.stdin))
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, given_cores())
        logging.basicConfig(
            level=config.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        told, tell = os.pipe()
        if os.fork():
            # The starter waits for this process only; the node itself is nobody's child.
            os.close(tell)
            os._exit(0 if os.read(told, 1) else 2)
        os.close(told)
        # What ends the starter's terminal or job must not end us. A session of our own would be a
        # scheduling group of our own too (autogroup), and ranks that spin in sched_yield() were
        # seen to keep such a group from running for seconds.
        os.setpgid(0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def on_ready() -> None:
            with contextlib.suppress(BrokenPipeError):  # the starter has lost patience
                os.write(tell, b"1")
            os.close(tell)

        run(config, on_demand=True, on_ready=on_ready)
    except (KVStrataError, OSError) as error:
        print(f"kvstrata node: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
