"""A place for engines and their node to meet, apart from the user's own.

A `Workplace` keeps socket, secret and logs of one experiment in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kvstrata.config import Config, load_config
from kvstrata.errors import DeadlineExceeded, NodeUnavailable
from kvstrata.testing.engine import CONNECTOR, Engine, engine_environment, last_words
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect
from kvstrata.wire.sockets import socket_path

W = TypeVar("W", bound="Workplace")
E = TypeVar("E", bound="Engine")

NODE_END_S = 30.0

SERVE = "from kvstrata.cli import main; main()"


class Workplace:
    """Where engines and one node meet: a private socket, secret and log in a temporary folder.

    Use as a context manager; leaving it ends the engines and the node and removes the folder.

    Args:
        model: folder of the model.
        settings: KVStrata's options, dotted.
        service: start the node with ``kvstrata serve`` instead of on demand; or with this Python
            code, which gets the same arguments.
    """

    def __init__(
        self, model: Path, settings: Mapping[str, Any] | None = None, service: bool | str = False
    ) -> None:
        # Not in $TMPDIR: a socket's path has room for little more than a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="kvstrata-", dir="/tmp"))
        self._model = model
        self._settings = {
            "secret_file": str(self.folder / "secret"),
            "linger": "1s",
            # Answers are compared token by token, and another number of loaded tokens is another
            # split of the rest, so another rounding.
            "inside": "off",
            **(settings or {}),
        }
        if service:
            self._settings["node"] = f"unix:{self.folder}/node.sock"
        self._engines: list[Engine] = []
        self._clients: list[NodeClient] = []
        self._pids: set[int] = set()
        self._service: subprocess.Popen[bytes] | None = None
        self._code = service if isinstance(service, str) else SERVE
        if service:
            self._serve()

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.end()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def config(self) -> Config:
        """KVStrata's configuration here."""
        return load_config(environ={}, overrides=self._settings)

    @property
    def settings(self) -> dict[str, Any]:
        """KVStrata's options here, dotted."""
        return dict(self._settings)

    @property
    def connector(self) -> dict[str, Any]:
        """vLLM's ``kv_transfer_config`` for an engine here."""
        return {**CONNECTOR, "kv_connector_extra_config": self._settings}

    @property
    def environment(self) -> dict[str, str]:
        """What an engine here needs in its environment, to find the node."""
        return {"XDG_RUNTIME_DIR": str(self.folder)}

    def engine(
        self, options: Mapping[str, Any] | None = None, with_kvstrata: bool = True
    ) -> Engine:
        """Begin to start an engine; the first one with KVStrata starts the node."""
        return self.engine_of(Engine, options, with_kvstrata)

    def engine_of(
        self, kind: type[E], options: Mapping[str, Any] | None = None, with_kvstrata: bool = True
    ) -> E:
        """The same, of a kind that has its own child's side."""
        options = dict(options or {})
        if with_kvstrata:
            options["kv_transfer_config"] = self.connector
        log = self.folder / f"engine-{len(self._engines)}.log"
        engine = kind(self._model, log, self.environment, options)
        self._engines.append(engine)
        return engine

    def client(self) -> NodeClient:
        """A client of the node, which must run. Closed by `end`.

        Raises:
            NodeUnavailable: it does not run.
        """
        path = socket_path(self.config, {"XDG_RUNTIME_DIR": str(self.folder)})
        client = connect(replace(self.config, node=f"unix:{path}"))
        self._clients.append(client)
        self._pids.add(client.hello.pid)
        return client

    def end(self) -> None:
        """End every process here and wait for that; the folder stays. Repeatable.

        An on-demand node ends by itself after its last client, a service on SIGTERM; both write
        behind what is still queued.
        """
        if not self._pids:
            with contextlib.suppress(NodeUnavailable, DeadlineExceeded):
                self.client()
        for engine in self._engines:
            engine.close()
        self._engines.clear()
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._service is not None:
            self._service.terminate()
            self._service.wait(NODE_END_S)
            self._service = None
        deadline = time.monotonic() + NODE_END_S
        while self._pids:
            pid = next(iter(self._pids))
            if not _running(pid):
                self._pids.remove(pid)
            elif time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _serve(self) -> None:
        arguments = [f"--set={key}={value}" for key, value in self._settings.items()]
        with (self.folder / "node.log").open("ab") as output:
            self._service = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    self._code,
                    "serve",
                    *arguments,
                ],
                stdout=output,
                stderr=output,
                env=engine_environment({}),
            )
        deadline = time.monotonic() + NODE_END_S
        while True:
            try:
                self.client()
                return
            except NodeUnavailable as error:
                if self._service.poll() is not None or time.monotonic() > deadline:
                    words = last_words(self.folder / "node.log")
                    raise NodeUnavailable(f"the service did not start: {words}") from error
            time.sleep(0.02)


def wait_ready(client: NodeClient, timeout_s: float = 60.0) -> None:
    """Return when a node's memory is faulted in and its tiers know what they hold.

    Raises:
        DeadlineExceeded: it took longer, or a tier is off.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        state = client.status()
        host, tiers = state["host"], [(tier["name"], tier["state"]) for tier in state["tiers"]]
        populated = host["populated_bytes"] >= host["capacity_bytes"]
        if populated and all(what == "ok" for _, what in tiers):
            return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the node is not ready: faulted in {populated}, {tiers}")
        time.sleep(0.02)


def wait_stored(client: NodeClient, num_objects: int, timeout_s: float = 60.0) -> None:
    """Return when a node was given so many objects in its life, and has written them behind.

    Raises:
        DeadlineExceeded: it took longer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        state = client.status()
        stored = state["counters"].get("stored_objects_total", 0)
        if stored >= num_objects and not state["leases"]["reservations"]:
            client.flush()
            return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{stored:.0f} objects were stored, not {num_objects}")
        time.sleep(0.005)


def _running(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
