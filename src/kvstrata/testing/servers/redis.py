"""A real Redis, or a cluster of three, on loopback; needs the program ``redis-server``."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from kvstrata.testing.ground import Server
from kvstrata.testing.ports import free_port

PROGRAM = "redis-server"
START_S = 30.0


def installed() -> bool:
    """Whether there is a Redis on this machine."""
    return shutil.which(PROGRAM) is not None


class RedisServer(Server):
    """One server, which keeps everything in memory and nothing on disk.

    Args:
        folder: for its files; made if missing.
        options: more of them, as for its command line.
        client: more for `redis.Redis`, with which it is looked after.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), **client: Any) -> None:
        self.port = free_port()
        self._folder = folder
        self._client: dict[str, Any] = {"port": self.port, **client}
        port = () if "--tls-port" in options else ("--port", str(self.port))
        self._command = [
            PROGRAM, *port, "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "no", "--daemonize", "no",
            "--logfile", str(folder / "log"),
            *(one.replace("PORT", str(self.port)) for one in options),
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.wait()

    @property
    def url(self) -> str:
        """Where it is, for whoever needs no password."""
        return f"redis://127.0.0.1:{self.port}"

    def admin(self) -> redis.Redis:
        """A client of its own; the caller closes it."""
        return redis.Redis(host="127.0.0.1", **self._client)

    def start(self) -> None:
        """Start it, without waiting until it answers."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                with self.admin() as client:
                    client.ping()
                return
            except redis.RedisError:
                process = self._process
                if time.monotonic() > deadline or process is None or process.poll() is not None:
                    log = (self._folder / "log").read_text()
                    raise RuntimeError(f"{PROGRAM} does not answer:\n{log}") from None
                time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()
        self.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def fill(self) -> bool:
        with self.admin() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", client.info("memory")["used_memory"] + (1 << 20))
        return True

    def make_room(self) -> None:
        with self.admin() as client:
            client.config_set("maxmemory", 0)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class RedisCluster(Server):
    """A cluster of three primaries."""

    def __init__(self, folder: Path) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
        self.servers = [RedisServer(folder / str(number), options) for number in range(3)]
        share = 16384 / len(self.servers)
        for number, server in enumerate(self.servers):
            first, last = round(number * share), round((number + 1) * share) - 1
            with server.admin() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                for other in self.servers[:number]:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port)
        self._wait()

    @property
    def url(self) -> str:
        """Where it is; all of them are named."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{one.port}" for one in self.servers)

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def restart(self) -> None:
        self.kill()
        for server in self.servers:
            server.start()
        self._wait()

    def pause(self) -> None:
        for server in self.servers:
            server.pause()

    def resume(self) -> None:
        for server in self.servers:
            server.resume()

    def fill(self) -> bool:
        return all([server.fill() for server in self.servers])

    def make_room(self) -> None:
        for server in self.servers:
            server.make_room()

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _wait(self) -> None:
        """Until all of them know of all slots."""
        deadline = time.monotonic() + START_S
        for server in self.servers:
            server.wait()
        while not all(self._is_whole(server) for server in self.servers):
            if time.monotonic() > deadline:
                raise RuntimeError("the servers do not become a cluster")
            time.sleep(0.05)

    def _is_whole(self, server: RedisServer) -> bool:
        with server.admin() as client:
            found: dict[str, str] = client.execute_command("CLUSTER INFO")
        return found["cluster_state"] == "ok" and found["cluster_known_nodes"] == str(
            len(self.servers)
        )
