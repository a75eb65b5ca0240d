"""How a client comes to a node: it joins one, or starts one on demand.

Of several clients that find no node, one starts it, under a lock, and the others wait for it. The
node lives in a process group of its own, so it outlives the engine that happened to start it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from kvstrata.config import Config
from kvstrata.errors import NodeUnavailable
from kvstrata.wire.client import NodeClient
from kvstrata.wire.sockets import beside, prepare_folder, socket_path

RETRY_S = 0.02


def connect(config: Config, timeout_s: float | None = None) -> NodeClient:
    """A client of the configured node; starts it when the configuration says ``auto``.

    Args:
        config: ``node`` says which; see `kvstrata.config`.
        timeout_s: ``config.deadlines.attach`` if None.

    Raises:
        NodeUnavailable: no node answers; with the path of the log when it was started here.
        Incompatible: it speaks another protocol version.
        ConfigError: the socket's folder cannot be used.
    """
    deadline = time.monotonic() + (config.deadlines.attach if timeout_s is None else timeout_s)
    path = socket_path(config)
    if config.node != "auto":
        return _join(path, deadline)
    with contextlib.suppress(NodeUnavailable):
        return _join(path, deadline)
    prepare_folder(path.parent)
    with open(beside(path, ".start"), "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(deadline, path, "somebody else is starting the node")
        with contextlib.suppress(NodeUnavailable):
            return _join(path, deadline)
        _start(config, path, deadline)
        return _join(path, deadline)


def _join(path: Path, deadline: float) -> NodeClient:
    left = max(0.1, deadline - time.monotonic())
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(left)
        connected.connect(str(path))
    except OSError as error:
        connected.close()
        raise NodeUnavailable(
            f"no node answers on {path} ({error.strerror or error}); is `kvstrata serve` running?"
        ) from error
    return NodeClient(connected, left)


def _start(config: Config, path: Path, deadline: float) -> None:
    """Start a node and return when it listens."""
    log = beside(path, ".log")
    with open(log, "ab") as output:
        try:
            subprocess.run(
                [sys.executable, "-m", "kvstrata.node.process.run"],
                input=json.dumps(config.to_dict()).encode(),
                stdout=output,
                stderr=output,
                cwd="/",
                # Our modules, wherever we have them from: "" is our folder, not the node's.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                timeout=max(1.0, deadline - time.monotonic()),
                check=True,
            )
        except subprocess.CalledProcessError as error:
            raise NodeUnavailable(f"the node did not start: {_tail(log)} ({log})") from error
        except subprocess.TimeoutExpired as error:
            raise NodeUnavailable(f"the node does not come up; {log} may say why") from error


def _wait(deadline: float, path: Path, why: str) -> None:
    if time.monotonic() > deadline:
        raise NodeUnavailable(f"{why} ({beside(path, '.log')} may say why)")
    time.sleep(RETRY_S)


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word in its log"
    return "no log"
