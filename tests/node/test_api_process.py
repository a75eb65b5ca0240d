"""The API as a process: it begins and ends with its node, and outlives one that is not its own."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.control import Client
from kvstrata.errors import NodeUnavailable
from kvstrata.node.process.companion import PROGRAM

TIMEOUT_S = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


class Processes:
    """Commands in an environment of their own, each killed at the end if it still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = f"unix:{folder}/node.sock"
        self.begun: list[subprocess.Popen[str]] = []
        kept = {name: value for name, value in os.environ.items() if "KVSTRATA_" not in name}
        self.environ = {
            **kept,
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "KVSTRATA_HOST_CAPACITY": "16MiB",
        }

    def begin(self, *command: str, code: str | None = None) -> subprocess.Popen[str]:
        program = ["-m", "kvstrata.cli"] if code is None else ["-c", code]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *program, *command],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.begun.append(process)
        return process

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvstrata.cli", *command],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def end(self) -> None:
        for process in self.begun:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def processes(folder: Path) -> Iterator[Processes]:
    processes = Processes(folder)
    yield processes
    processes.end()


def said(process: subprocess.Popen[str], begin: str) -> str:
    """The rest of the line that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(begin):
            return line.removeprefix(begin).strip()
    raise AssertionError(f"it ended without saying {begin!r}")


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if found := true():
                return found
        except NodeUnavailable:
            pass
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def listens(url: str) -> bool:
    """Whether somebody is behind a Unix socket; httpx would leave its own unclosed if not."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(url.removeprefix("unix:")) == 0


def apis_of(pid: int) -> list[int]:
    """The processes that a node began as its API."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == pid and PROGRAM.encode() in words:
            found.append(int(entry))
    return found


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], TIMEOUT_S)[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_begins_and_ends_its_api(processes: Processes, number: int) -> None:
    serving = processes.begin("serve", "--socket", processes.node, "--api", "127.0.0.1:0")
    with Client(said(serving, "API on ")) as client:
        said(serving, "serving on ")
        assert client.version().node_pid == serving.pid
    (api,) = apis_of(serving.pid)
    watched = os.pidfd_open(api)
    serving.send_signal(number)
    assert ended(watched), "it does not outlive its node"
    os.close(watched)
    assert serving.wait(TIMEOUT_S) == (0 if number == signal.SIGTERM else -number)


def test_an_api_that_died_is_started_again(processes: Processes) -> None:
    api_socket = f"unix:{processes.folder}/api.sock"
    serving = processes.begin("serve", "--socket", processes.node, "--api", api_socket)
    assert said(serving, "API on ") == api_socket
    said(serving, "serving on ")
    (api,) = apis_of(serving.pid)
    watched = os.pidfd_open(api)
    signal.pidfd_send_signal(watched, signal.SIGKILL)
    assert ended(watched)
    os.close(watched)
    until(lambda: listens(api_socket))
    with Client(api_socket) as client:
        until(lambda: client.version().node_pid == serving.pid)
    serving.terminate()
    assert serving.wait(TIMEOUT_S) == 0


def test_a_service_whose_api_cannot_start_says_why(processes: Processes) -> None:
    done = processes.run("serve", "--socket", processes.node, "--api", "0.0.0.0:0")
    assert done.returncode == 2
    assert "kvstrata: api.token_file: missing" in done.stderr
    assert not (processes.folder / "node.sock").exists()


def test_an_api_outlives_a_node_that_is_not_its_own(processes: Processes) -> None:
    alone = processes.begin("api", "--node", processes.node, "--listen", "127.0.0.1:0")
    with Client(said(alone, "API on ")) as client:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with pytest.raises(NodeUnavailable, match="no node answers"):
                client.ready()
            serving = processes.begin("serve", "--socket", processes.node)
            said(serving, "serving on ")
            assert until(client.version).node_pid == serving.pid
            serving.send_signal(number)
            serving.wait(TIMEOUT_S)
        assert client.health().status == "ok"
    alone.terminate()
    assert alone.wait(TIMEOUT_S) == 0


ENGINE = """
import sys
from kvstrata.config import load_config
from kvstrata.wire.launch import connect
client = connect(load_config())
print("joined", client.hello.pid, flush=True)
sys.stdin.close()
import time
while True:
    time.sleep(1)
"""


def test_an_on_demand_node_has_an_api_and_does_not_stay_for_it(processes: Processes) -> None:
    api_socket = f"unix:{processes.folder}/api.sock"
    processes.environ |= {"KVSTRATA_API_LISTEN": api_socket, "KVSTRATA_LINGER": "100ms"}
    engine = processes.begin(code=ENGINE)
    node = int(said(engine, "joined "))
    watched = os.pidfd_open(node)
    until(lambda: listens(api_socket))
    with Client(api_socket) as client:
        assert until(client.version).node_pid == node
        looked = processes.run("lookup", "--tokens", "1,2")
        assert "no engine has told this node of its model" in looked.stderr
        (api,) = apis_of(node)
        its = os.pidfd_open(api)
        engine.kill()
        assert ended(watched), "its last client is gone, and its API does not count"
        assert ended(its)
    os.close(watched)
    os.close(its)


def test_an_on_demand_node_whose_api_cannot_start_serves_without(processes: Processes) -> None:
    processes.environ |= {"KVSTRATA_API_LISTEN": "0.0.0.0:0", "KVSTRATA_LINGER": "100ms"}
    engine = processes.begin(code=ENGINE)
    node = int(said(engine, "joined "))
    watched = os.pidfd_open(node)
    logs = list((processes.folder / "kvstrata").glob("*.log"))
    assert logs
    until(lambda: any("this node has no API" in log.read_text() for log in logs))
    status = processes.run("status", "--json")
    assert json.loads(status.stdout)["pid"] == node
    engine.kill()
    assert ended(watched)
    os.close(watched)
