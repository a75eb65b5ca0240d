"""The commands as processes: a service that is started, looked at, stopped and killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.cli.canary import Canary
from kvstrata.config import load_config
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect

TIMEOUT_S = 180


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


class Commands:
    """Runs ``kvstrata`` with an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("KVSTRATA_")
        }
        self.environ |= {
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "KVSTRATA_HOST_CAPACITY": "32MiB",
            "KVSTRATA_DISK_PATH": str(folder / "disk"),
            "KVSTRATA_DISK_CAPACITY": "64MiB",
            "KVSTRATA_LINGER": "100ms",
        }
        self.services: list[subprocess.Popen[str]] = []

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def serve(self, *arguments: str) -> subprocess.Popen[str]:
        """A service, not necessarily ready."""
        with open(self.folder / "serve.log", "ab") as log:
            service = subprocess.Popen(
                self._command(("serve", *arguments)),
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.services.append(service)
        return service

    def connect(self) -> NodeClient:
        """A client in this process of the service or the on-demand node."""
        config = {
            "node": f"unix:{next(self.folder.rglob('*.sock'))}",
            "secret_file": str(self.folder / "config/kvstrata/secret"),
        }
        return connect(load_config(environ={}, overrides=config))

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        code = "from kvstrata.cli import main; main()"
        return [sys.executable, "-c", code, *arguments]


@pytest.fixture
def commands(folder: Path) -> Iterator[Commands]:
    found = Commands(folder)
    yield found
    for service in found.services:
        service.kill()
        service.communicate()


def read_until(service: subprocess.Popen[str], words: str) -> list[str]:
    """The service's lines up to the one that begins with these words."""
    assert service.stdout is not None
    lines = []
    for line in service.stdout:
        lines.append(line)
        if line.startswith(words):
            return lines
    pytest.fail(f"the service ended without saying {words!r}: {lines}")


def wait_for_end(pid: int) -> bool:
    """Whether a process that is nobody's child here ends in time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], TIMEOUT_S)[0])
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_from_start_to_end(commands: Commands, folder: Path, number: int) -> None:
    at = f"unix:{folder}/run/node.sock"
    service = commands.serve("--socket", at)
    lines = read_until(service, "serving on ")
    assert any(line.startswith('capacity = "32MiB"  # environment') for line in lines)
    assert lines[-1].startswith(f"serving on {at} (pid {service.pid}, 32MiB)")

    state = json.loads(commands.run("status", "--json", "--node", at).stdout)
    assert state["pid"] == service.pid
    second = commands.run("serve", "--socket", at)
    assert second.returncode == 2
    assert f"a node already listens on {folder}/run/node.sock: pid {service.pid}" in second.stderr

    doctor = commands.run("doctor", "--node", at)
    assert doctor.returncode == 0, doctor.stdout
    assert "ok    disk read:" in doctor.stdout

    client = commands.connect()
    canary = Canary(client, 8, 1 << 20, 10.0)
    assert canary.store().problem == ""
    service.send_signal(number)  # with most of it still to be written
    assert service.wait(TIMEOUT_S) == 0
    assert service.stdout is not None
    assert service.stdout.read().endswith("drained, and ended\n")
    client.close()
    assert len(list(folder.glob("disk/objects/*/*.kvo"))) == 8
    assert not list(folder.rglob("*.sock"))
    gone = commands.run("status", "--node", at)
    assert gone.returncode == 1
    assert "no node answers" in gone.stderr


def test_clear_reaches_what_an_earlier_service_wrote(commands: Commands, folder: Path) -> None:
    at = f"unix:{folder}/node.sock"
    service = commands.serve("--socket", at)
    read_until(service, "serving on ")
    client = commands.connect()
    assert Canary(client, 4, 4096, 10.0).store().problem == ""
    client.flush()
    client.close()
    service.terminate()
    assert service.wait(TIMEOUT_S) == 0

    service = commands.serve("--socket", at)
    read_until(service, "serving on ")
    client = commands.connect()
    while client.status()["tiers"][0]["state"] == "scanning":
        pass
    client.close()
    refused = commands.run("clear", "--node", at)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--yes" in refused.stderr
    cleared = commands.run("clear", "--node", at, "--yes")
    assert (cleared.returncode, cleared.stdout) == (0, "forgot 4 objects (host, disk)\n")
    assert not list(folder.glob("disk/objects/*/*.kvo"))


def test_a_killed_service_leaves_its_socket_to_the_next(commands: Commands, folder: Path) -> None:
    at = f"unix:{folder}/node.sock"
    service = commands.serve("--socket", at)
    read_until(service, "serving on ")
    service.kill()
    service.wait(TIMEOUT_S)
    assert (folder / "node.sock").exists()
    status = commands.run("status", "--node", at)
    assert (status.returncode, status.stdout) == (1, "")
    assert "Connection refused" in status.stderr
    read_until(commands.serve("--socket", at), "serving on ")
    assert commands.run("status", "--node", at).returncode == 0


def test_systemd_is_told_when_engines_can_connect(commands: Commands, folder: Path) -> None:
    at = f"unix:{folder}/node.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(TIMEOUT_S)
        commands.environ["NOTIFY_SOCKET"] = f"{folder}/notify"
        commands.serve("--socket", at)
        assert systemd.recv(100) == b"READY=1"
    assert commands.run("status", "--node", at).returncode == 0


def test_doctor_starts_a_node_on_demand_and_status_does_not(commands: Commands) -> None:
    status = commands.run("status")
    assert (status.returncode, status.stdout) == (1, "")
    doctor = commands.run("doctor", "--json")
    answer = json.loads(doctor.stdout)
    node = next(check for check in answer["checks"] if check["name"] == "node")
    assert answer["ok"], answer
    assert "started one on demand, pid " in node["message"]
    pid = int(node["message"].partition("on demand, pid ")[2].partition(";")[0])
    assert wait_for_end(pid)
    assert commands.run("status").returncode == 1


def test_doctor_goes_through_every_tier(commands: Commands) -> None:
    commands.environ["KVSTRATA_MEMORY_CAPACITY"] = "16MiB"
    doctor = commands.run("doctor")
    assert doctor.returncode == 0, doctor.stdout
    lines = [line for line in doctor.stdout.splitlines() if "read:" in line]
    assert [line.split(":")[0] for line in lines] == [
        f"ok    {tier} read" for tier in ("host", "memory", "disk")
    ]


def test_a_service_without_a_socket_is_found_by_on_demand_clients(commands: Commands) -> None:
    service = commands.serve()
    read_until(service, "serving on ")
    assert json.loads(commands.run("status", "--json").stdout)["pid"] == service.pid
    doctor = json.loads(commands.run("doctor", "--json").stdout)
    node = next(check for check in doctor["checks"] if check["name"] == "node")
    assert node["message"] == f"joined pid {service.pid}"


def test_doctor_names_who_holds_the_folder(commands: Commands, folder: Path) -> None:
    first = commands.serve("--socket", f"unix:{folder}/first.sock")
    read_until(first, "serving on ")
    second = commands.serve("--socket", f"unix:{folder}/second.sock")
    read_until(second, "serving on ")
    doctor = commands.run("doctor", "--node", f"unix:{folder}/second.sock")
    assert doctor.returncode == 1
    (line,) = [line for line in doctor.stdout.splitlines() if line.startswith("FAIL")]
    assert f"is held by process {first.pid}" in line
    assert "a folder belongs to one node" in line
    # On demand the reason comes from the node's own log.
    doctor = commands.run("doctor")
    assert doctor.returncode == 1
    assert f"is held by process {first.pid}" in doctor.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_doctor_of_another_user_is_told_whose_socket_it_is(
    commands: Commands, folder: Path
) -> None:
    at = f"unix:{folder}/node.sock"
    read_until(commands.serve("--socket", at), "serving on ")
    folder.chmod(0o755)
    # The first run imports all that the second one could not: this Python may be root's alone.
    program = """
import os, sys
from kvstrata.cli import main
try:
    main()
except SystemExit:
    print("and now as somebody else")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
main()
"""
    doctor = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--node", at],
        env=commands.environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert doctor.returncode == 1, doctor.stderr
    other = doctor.stdout.partition("and now as somebody else")[2]
    assert "FAIL  node:" in other
    assert "Permission denied" in other
    assert "belongs to user 0, you are 65534" in other


def test_a_service_keeps_the_cores_it_was_given(commands: Commands) -> None:
    given = {min(os.sched_getaffinity(0))}
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, given)
    try:
        service = commands.serve()
    finally:
        os.sched_setaffinity(0, mine)
    read_until(service, "serving on")
    assert os.sched_getaffinity(service.pid) == given


def test_a_service_leaves_a_file_alone_that_is_no_socket(commands: Commands, folder: Path) -> None:
    thesis = folder / "thesis.pdf"
    thesis.write_text("years of work")
    said = commands.run("serve", "--socket", f"unix:{thesis}")
    assert said.returncode == 2
    assert "thesis.pdf is there and is no socket: it is left alone" in said.stderr
    assert thesis.read_text() == "years of work"
