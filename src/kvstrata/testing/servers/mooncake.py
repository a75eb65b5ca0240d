"""A real Mooncake Store on loopback: its master, and processes that lend it memory.

Run as a program this is such a process: ``python -m kvstrata.testing.servers.mooncake MASTER
METADATA BYTES``. It ends with its standard input, and does there what it is told, line by line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvstrata.testing.ground import Server
from kvstrata.testing.ports import HOST, free_port
from kvstrata.tiers.mooncake.client import library
from kvstrata.tiers.mooncake.settings import Settings, parse_master

START_S = 30.0
SEGMENT_BYTES = 64 << 20
LEASE = "50ms"
"""For how long the master keeps from removing what was asked for; 10 s unless told otherwise."""


def installed() -> bool:
    """Whether there is a Mooncake on this machine."""
    return importlib.util.find_spec("mooncake") is not None


def program() -> str:
    """Of the master, as the package brings it."""
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return os.path.join(spec.submodule_search_locations[0], "mooncake_master")


class Lender:
    """A process that lends the store memory, and nothing else."""

    def __init__(self, master: str, metadata: str, nbytes: int, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, master, metadata, str(nbytes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self.hears("ready")

    def tell(self, word: str) -> None:
        """Have it do this, and wait until it has."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        self.hears(word)

    def hears(self, word: str) -> None:
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said == word, f"a lender of memory said {said!r} instead of {word!r}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class MooncakeServer(Server):
    """A master and its lenders, as one server that lives and dies as a whole.

    Args:
        folder: for their logs; made if missing.
        num_lenders: processes that lend `SEGMENT_BYTES` each.
        options: more of them for the master.
        port: of the master; 0: a free one.
        metadata: whether there is a metadata server, or clients ask one another.
    """

    def __init__(
        self,
        folder: Path,
        num_lenders: int = 1,
        options: Sequence[str] = (),
        port: int = 0,
        metadata: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host, port = HOST, port or free_port()
        self.address = f"{host}:{port}"
        self.metadata = "P2PHANDSHAKE"
        self.lenders: list[Lender] = []
        self._log = folder / "log"
        self._num_lenders = num_lenders
        self._command = [
            program(), f"-rpc_address={host}", f"-rpc_port={port}", "-logtostderr",
            f"-metrics_host={host}", f"-metrics_port={free_port()}",
            f"-default_kv_lease_ttl={LEASE}", "-client_ttl=60", *options,
        ]  # fmt: skip
        if metadata:
            where = free_port()
            self.metadata = f"http://{host}:{where}/metadata"
            self._command += [
                "-enable_http_metadata_server", f"-http_metadata_server_host={host}",
                f"-http_metadata_server_port={where}",
            ]  # fmt: skip
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self.master = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        host, _, port = self.address.partition(":")
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
                break
            assert self.master.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "the master does not listen"
            time.sleep(0.02)
        for _ in range(self._num_lenders):
            self.lenders.append(Lender(self.address, self.metadata, SEGMENT_BYTES, self._log))

    def kill(self) -> None:
        self.master.kill()
        self.master.wait()
        for lender in self.lenders:
            lender.kill()
        self.lenders.clear()

    def restart(self) -> None:
        self._start()

    def pause(self) -> None:
        self.master.send_signal(signal.SIGSTOP)
        self.pause_lenders()

    def resume(self) -> None:
        self.master.send_signal(signal.SIGCONT)
        self.resume_lenders()

    def pause_lenders(self) -> None:
        """Let those hang that lend memory; the master goes on."""
        for lender in self.lenders:
            lender.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, lender.process.pid, os.WSTOPPED)

    def resume_lenders(self) -> None:
        """Let them go on."""
        for lender in self.lenders:
            lender.process.send_signal(signal.SIGCONT)

    def fill(self) -> bool:
        for lender in self.lenders:
            lender.tell("fill")
        return True

    def make_room(self) -> None:
        for lender in self.lenders:
            lender.tell("empty")

    def close(self) -> None:
        self.kill()


def main() -> None:
    """Lend memory until the standard input ends."""
    master, metadata, nbytes = sys.argv[1:]
    settings = Settings(master=parse_master(master), metadata=metadata)
    module = library()
    store = module.MooncakeDistributedStore()
    code = store.setup(
        settings.master.host, settings.metadata, int(nbytes), 1 << 24, "tcp", "", master
    )
    print("ready" if code == 0 else f"code {code}", flush=True)
    pinned = module.ReplicateConfig()
    pinned.with_hard_pin = True
    filling: list[str] = []
    sizes = 1 << 20, 1 << 16, 1 << 12
    for line in sys.stdin:
        if line.strip() == "fill":
            for size in sizes:
                key = f"filling/{len(filling)}"
                while store.put(key, bytes(size), pinned) == 0:
                    filling.append(key)
                    key = f"filling/{len(filling)}"
        else:
            store.batch_remove(filling, True)
            filling.clear()
        print(line.strip(), flush=True)


if __name__ == "__main__":
    main()
