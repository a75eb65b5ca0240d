"""The API as a process: binds its address, serves, and ends when it is told to.

``python -m kvstrata.control.run`` reads a line of configuration as JSON from standard input, says
in a line on standard output where it listens, and ends when standard input does: so a node has an
API beside it, and the API never outlives the node. ``kvstrata api`` calls `serve` itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop

from kvstrata import descriptors
from kvstrata.config import Config, load_config
from kvstrata.config.api import ApiConfig
from kvstrata.control import app as application
from kvstrata.control.http import HEAD_S, IDLE_S, MAX_CONNECTIONS, MAX_HEAD_BYTES, Connection
from kvstrata.errors import ConfigError, KVStrataError
from kvstrata.transfer.tcp import Address
from kvstrata.wire.sockets import remove_dead

logger = logging.getLogger(__name__)

BACKLOG = 1024
GRACE_S = 3
"""For answers under way when the API ends."""
OTHER_FILES = 256
"""Descriptors beside those of clients."""


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us, and waits for no TLS handshake longer than a head."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on these."""
        await super().startup([])
        secure = self.config.ssl
        for listener in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                self._connection,
                sock=listener,
                ssl=secure,
                ssl_handshake_timeout=HEAD_S if secure else None,
                backlog=BACKLOG,
            )
            self.servers.append(server)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)


def serve(
    config: Config,
    on_ready: Callable[[str], None],
    ended: threading.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``ended``.

    Args:
        config: ``api.listen`` says where, ``node`` for which node.
        on_ready: called with the API's URL once clients can connect.
        ended: looked at ten times a second.

    Raises:
        ConfigError: it cannot listen there, or needs a token or another certificate.
    """
    if config.api.listen is None:
        raise ConfigError("api.listen", "missing; expected an address such as 127.0.0.1:7780")
    app, _ = application.build(config)
    # What it warns of is what hostile clients send, as often as they like.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    options = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ssl_certfile=config.api.tls_certificate,
        ssl_keyfile=config.api.tls_key,
    )
    try:
        options.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("api.tls_certificate", f"cannot be used: {error}") from error
    descriptors.allow(MAX_CONNECTIONS + OTHER_FILES)
    server = Server(options)
    with _listening(config.api) as (listener, url):
        uvloop.run(_run(server, listener, lambda: on_ready(url), ended))


async def _run(
    server: Server,
    listener: socket.socket,
    on_ready: Callable[[], None],
    ended: threading.Event | None,
) -> None:
    def end() -> None:
        server.should_exit = True

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, end)
    serving = asyncio.ensure_future(server.serve([listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready()
    while not serving.done():
        if ended is not None and ended.is_set():
            end()
        await asyncio.wait({serving}, timeout=0.1)
    await serving


@contextlib.contextmanager
def _listening(config: ApiConfig) -> Iterator[tuple[socket.socket, str]]:
    """The API's socket and URL; a Unix socket is for this user only, and gone at the end."""
    where, scheme = config.listen, "http" if config.tls_certificate is None else "https"
    if isinstance(where, Address):
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        try:
            listener = socket.create_server(
                (where.host, where.port), family=family, backlog=BACKLOG
            )
        except OSError as error:
            raise ConfigError(
                "api.listen", f"cannot listen on {where}: {error.strerror}"
            ) from error
        with listener:
            yield listener, f"{scheme}://{Address(where.host, listener.getsockname()[1])}"
        return
    assert isinstance(where, Path)
    mask = os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_dead(where)
        listener.bind(str(where))
        listener.listen(BACKLOG)
    except ConfigError as error:
        listener.close()
        raise ConfigError("api.listen", error.problem) from error
    except OSError as error:
        listener.close()
        raise ConfigError("api.listen", f"cannot listen on {where}: {error.strerror}") from error
    finally:
        os.umask(mask)
    try:
        yield listener, f"unix:{where}"
    finally:
        listener.close()
        where.unlink(missing_ok=True)


def _main() -> None:
    """Beside a node."""

    def say(words: dict[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(words), flush=True)

    ended = threading.Event()
    try:
        config = load_config(environ={}, overrides=json.loads(sys.stdin.readline()))
        logging.basicConfig(
            level=config.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )

        def watch() -> None:
            # Not by sys.stdin, whose lock a thread that waits would hold at the process's end.
            while os.read(0, 4096):
                pass
            ended.set()

        threading.Thread(target=watch, name="kvstrata-node-watch", daemon=True).start()
        serve(config, lambda url: say({"url": url}), ended)
    except ConfigError as error:
        say({"path": error.path, "problem": error.problem})
        sys.exit(2)
    except KVStrataError as error:
        say({"path": "api", "problem": str(error)})
        sys.exit(2)


if __name__ == "__main__":
    _main()
