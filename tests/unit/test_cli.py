"""The commands against a node in this process: what they print, refuse and find."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.support.attached import Attached
from tests.support.nodes import NAMESPACE, owned

import kvstrata
from kvstrata import cli
from kvstrata.cli import checks, doctor, engines, join, round_trip, serve
from kvstrata.cli.canary import Canary
from kvstrata.cli.counting import label_values, labelled, total
from kvstrata.config import Config, DiskConfig, load_config
from kvstrata.errors import ConfigError, ReadOnly, TierUnavailable
from kvstrata.keys import owner_digest
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.node.service.calls import ENCODE_DEADLINE_S
from kvstrata.node.service.probe import PROBE_KEY
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient
from kvstrata.wire.sockets import beside, socket_path

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket's; a write of its node may end after it."""
    with tempfile.TemporaryDirectory(prefix="kv-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _no_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTRATA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))


def settings(folder: Path, **more: str) -> dict[str, str]:
    """A small node with a disk tier, on a socket in the folder."""
    return {
        "node": f"unix:{folder}/node.sock",
        "host.capacity": "16MiB",
        "disk.path": str(folder / "disk"),
        "disk.capacity": "64MiB",
        "disk.scrub_rate": "0",
        **{name.replace("__", "."): value for name, value in more.items()},
    }


class Serving:
    """A node in this process that listens on a real socket."""

    def __init__(self, given: dict[str, str]) -> None:
        self.config: Config = load_config(environ={}, overrides=given)
        self.inprocess = InProcessNode(self.config)
        self.node = self.inprocess.node
        path = socket_path(self.config)
        self.inprocess.run(lambda: self.inprocess.server.listen(bind(path)))
        self.arguments = [f"--set={key}={value}" for key, value in given.items()]

    def close(self) -> None:
        """End the node; it must have lost nothing and hold nothing."""
        if self.inprocess._thread.is_alive():
            self.inprocess.check_integrity()
        self.inprocess.close()


@pytest.fixture
def start() -> Iterator[Callable[[dict[str, str]], Serving]]:
    started: list[Serving] = []

    def begin(given: dict[str, str]) -> Serving:
        started.append(Serving(given))
        return started[-1]

    yield begin
    for serving in started:
        serving.close()


@pytest.fixture
def serving(folder: Path, start: Callable[[dict[str, str]], Serving]) -> Serving:
    return start(settings(folder))


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line; answers exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kvstrata", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def store(serving: Serving, num_chunks: int = 4) -> None:
    """Put chunks into the node, in host memory and on disk."""
    client = serving.inprocess.connect()
    canary = Canary(client, num_chunks, 4096, 10.0)
    assert canary.store().problem == ""
    canary.write_behind()
    client.close()


def objects(serving: Serving) -> list[int]:
    """How many objects each tier holds."""
    node = serving.node
    return [node.host.index.num_objects, *(b.holdings()["num_objects"] for b in node.backings)]


def stored_files(serving: Serving) -> list[Path]:
    disk = serving.config.tier("disk")
    assert isinstance(disk, DiskConfig)
    paths = sorted(disk.path.glob("objects/*/*.kvo"))
    return [path for path in paths if not path.name.startswith(PROBE_KEY.hex())]


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


# joining


def test_no_node_is_one_line_and_starts_none(
    folder: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    for arguments in (["status"], ["status", "--json"], ["clear", "--yes"]):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("kvstrata: no node answers on ")
        assert err.count("\n") == 1
    assert not list(folder.rglob("*.sock"))
    assert not list(folder.rglob("*.lock"))


def test_other_nodes_are_named(
    folder: Path, serving: Serving, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = command("status", "--node", f"unix:{folder}/other.sock")
    assert code == 1
    assert f"--node unix:{folder}/node.sock" in err


def test_dead_sockets_are_not_named(folder: Path) -> None:
    bind(folder / "dead.sock").close()
    alive = bind(folder / "alive.sock")
    assert join.listening_nodes(folder) == [folder / "alive.sock"]
    alive.close()


def test_node_option_wins_over_the_configuration(folder: Path) -> None:
    config = join.configured(None, ["node=unix:/a.sock"], f"unix:{folder}/b.sock")
    assert config.node == f"unix:{folder}/b.sock"
    with pytest.raises(ConfigError, match="node"):
        join.configured(None, None, "somewhere")


# status


def test_status_for_programs(
    serving: Serving, command: Callable[..., tuple[int, str, str]]
) -> None:
    store(serving)
    code, out, _ = command("status", "--json", *serving.arguments)
    state = json.loads(out)
    assert code == 0
    assert state["socket"] == str(socket_path(serving.config))
    assert state["host"]["num_objects"] == 4
    assert [tier["name"] for tier in state["tiers"]] == ["disk"]
    assert state["tiers"][0]["num_objects"] == 4


def test_status_for_people(
    serving: Serving,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    store(serving)
    client = serving.inprocess.connect()
    client.record(
        {
            "request": "cmpl-7",
            "outcome": "stopped",
            "prompt_tokens": 3015,
            "miss": "partly stored",
            "seconds": 0.25,
        }
    )
    client.match([bytes(32)], [0], ["portable"]).wait(5.0)
    client.close()
    serving.inprocess.run(lambda: serving.node.counters.add("corrupt_objects_total", tier="disk"))
    serving.inprocess.run(lambda: owned(serving.node).trip(TierUnavailable("it fell down")))
    code, out, _ = command("status", *serving.arguments)
    assert code == 0
    for words in (
        f"KVStrata {kvstrata.__version__} · pid {os.getpid()}",
        "16MiB",
        "64MiB",
        "off: it fell down",
        "missed: 1",
        "objects stored: 4",
        "trouble: 1 objects failed their checksum and were dropped (disk)",
        "cmpl-7",
        "3015",
        "partly stored",
    ):
        assert words in out, words


def test_counters_by_name_and_label() -> None:
    counters = {'a{tier="disk",why="queue"}': 2.0, 'a{tier="host"}': 3.0, "b": 4.0, "ab": 5.0}
    assert labelled(counters, "a") == {'tier="disk",why="queue"': 2.0, 'tier="host"': 3.0}
    assert labelled(counters, "b") == {"": 4.0}
    assert label_values('tier="disk",why="queue"') == ["disk", "queue"]
    assert (total(counters, "a"), total(counters, "a", "disk"), total(counters, "c")) == (5, 2, 0)
    assert total(counters, "a", "dis") == 0


# clear


def test_clear_forgets_all_and_says_how_much(
    serving: Serving, command: Callable[..., tuple[int, str, str]]
) -> None:
    store(serving)
    assert objects(serving) == [4, 4]
    code, out, _ = command("clear", "--yes", *serving.arguments)
    assert (code, out) == (0, "forgot 8 objects (host, disk)\n")
    assert objects(serving) == [0, 0]
    assert stored_files(serving) == []


def test_clear_of_one_tier(serving: Serving, command: Callable[..., tuple[int, str, str]]) -> None:
    store(serving)
    assert command("clear", "-y", "--tier", "host", *serving.arguments)[0] == 0
    assert objects(serving) == [0, 4]
    assert command("clear", "-y", "--tier", "disk", *serving.arguments)[0] == 0
    assert objects(serving) == [0, 0]


def test_clear_may_be_of_a_tenant_a_namespace_or_an_age(
    serving: Serving, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving.inprocess.connect()
    secret = client.hello.secret
    keys = {"mine": [b"m" * 32], "theirs": [b"t" * 32, b"u" * 32]}
    for tenant, salt in (("mine", "s"), ("theirs", "")):
        Attached(client).store(keys[tenant], owner=owner_digest(secret, tenant, salt))
    client.flush()
    client.close()

    def clear(*options: str) -> str:
        code, out, err = command("clear", "--yes", *options, *serving.arguments)
        assert (code, err) == (0, "")
        return out

    for nothing in (
        ["--tenant", "mine"],  # without its salt it is another one
        ["--namespace", "ff" * 32],
        ["--older-than", "1h"],
    ):
        assert clear(*nothing) == "forgot 0 objects (host, disk)\n"
    assert clear("--tenant", "mine", "--salt", "s", "--tier", "host").startswith("forgot 1 object")
    assert clear("--tenant", "mine", "--salt", "s", "--namespace", NAMESPACE.hex()) == (
        "forgot 1 objects (host, disk)\n"
    )
    assert objects(serving) == [2, 2]
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    asked = command("clear", "--tenant", "theirs", "--older-than", "1s", *serving.arguments)[1]
    assert "Forget what is of tenant theirs, older than 1s in host 2 objects" in asked
    for wrong in (["--salt", "s"], ["--namespace", "xy"], ["--older-than", "soon"]):
        assert command("clear", "--yes", *wrong, *serving.arguments)[0] == 2
    assert objects(serving) == [2, 2]
    assert clear("--namespace", NAMESPACE.hex()) == "forgot 4 objects (host, disk)\n"


def test_clear_without_a_terminal_needs_yes(
    serving: Serving,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store(serving)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, err = command("clear", *serving.arguments)
    assert (code, out) == (2, "")
    assert "--yes" in err
    assert objects(serving) == [4, 4]


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("n", 4), ("y", 0)])
def test_clear_asks_on_a_terminal(
    serving: Serving,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    left: int,
) -> None:
    store(serving)
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    code, out, _ = command("clear", *serving.arguments)
    assert code == (1 if left else 0)
    assert "host 4 objects" in out
    assert "disk 4 objects" in out
    assert objects(serving) == [left, left]


def test_clear_of_a_tier_that_is_not_there(
    folder: Path,
    start: Callable[[dict[str, str]], Serving],
    command: Callable[..., tuple[int, str, str]],
) -> None:
    serving = start({"node": f"unix:{folder}/node.sock", "host.capacity": "16MiB"})
    code, _, err = command("clear", "--yes", "--tier", "disk", *serving.arguments)
    assert code == 2
    assert "no disk tier" in err


def test_clear_of_a_tier_that_is_off_does_not_pass_as_done(
    serving: Serving,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store(serving)

    def broken() -> None:
        raise TierUnavailable("disk: cannot clear it: Input/output error")

    monkeypatch.setattr(owned(serving.node).tier, "clear", broken)
    code, _, err = command("clear", "--yes", *serving.arguments)
    assert code == 1
    assert "not cleared for good" in err
    assert "Input/output error" in err


@pytest.fixture
def fleet(folder: Path, start: Callable[[dict[str, str]], Serving]) -> Serving:
    """A node with a store that others share, and with peers."""
    (folder / "store").mkdir()
    store = {
        "object_store.url": f"file://{folder / 'store'}",
        "object_store.capacity": "1GiB",
        "object_store.epoch_every": "100ms",
        "peer.nodes": "127.0.0.1:1",
    }
    serving = start({**settings(folder), **store})
    shared = next(one for one in serving.node.backings if one.name == "object_store")
    wait_for(lambda: shared.readable and shared._timed)
    return serving


def test_clear_of_a_store_that_is_shared(
    fleet: Serving,
    folder: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    epoch = (folder / "store" / "epoch").read_bytes()
    store(fleet)
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    code, out, _ = command("clear", "--tier", "object_store", *fleet.arguments)
    assert code == 0
    assert "Forget all of object_store what the whole fleet has there?" in out
    begun = (folder / "store" / "epoch").read_bytes()
    assert begun != epoch
    code, out, _ = command("clear", "--yes", *fleet.arguments)
    assert (code, out) == (0, "forgot 8 objects (host, disk, object_store)\n")
    assert (folder / "store" / "epoch").read_bytes() != begun
    code, _, err = command("clear", "--yes", "--tier", "disc", *fleet.arguments)
    assert code == 2
    assert "no disc tier; it has host, disk, object_store" in err


def test_clear_of_a_store_that_may_only_be_read(
    fleet: Serving,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> None:
        raise ReadOnly("permission denied")

    shared = next(one for one in fleet.node.backings if one.name == "object_store")
    monkeypatch.setattr(shared.tier, "begin_epoch", refused)
    store(fleet)
    code, _, err = command("clear", "--yes", *fleet.arguments)
    assert code == 1
    assert "object_store is not cleared, since this node may only read it" in err
    assert "not cleared for good" not in err
    assert fleet.node.host.index.num_objects == 0, "the others are"


# serve


def test_serve_refuses_a_socket_in_use(
    serving: Serving, command: Callable[..., tuple[int, str, str]]
) -> None:
    # As `run` does, the lock is held for as long as the node lives.
    with open(beside(socket_path(serving.config), ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = command("serve", *serving.arguments)
    assert code == 2
    assert f"a node already listens on {socket_path(serving.config)}: pid {os.getpid()}" in err
    assert "--socket" in err


def test_serve_waits_for_a_node_that_is_ending(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(environ={}, overrides=settings(folder))
    said: list[str] = []
    with open(folder / "node.sock.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def hear(message: str) -> None:
            said.append(message)
            fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr("kvstrata.cli.serve.typer.echo", hear)
        serve.wait_for_turn(config, folder / "node.sock")
    assert len(said) == 1
    assert "still writing to its tiers" in said[0]
    serve.wait_for_turn(config, folder / "node.sock")
    assert len(said) == 1  # nothing to wait for, nothing to say


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--socket", "unix:/proc/no/such.sock"], "cannot make the folder /proc/no"),
        (["--socket", "unix:/proc/such.sock"], "cannot start a node on /proc/such.sock"),
        (["--socket", "here.sock"], "expected"),
        (["--set", "host.capacity=900TiB"], "more than the memory this machine has"),
        (["--set", "host.capcity=1GiB"], "did you mean host.capacity"),
        (["--set", "disk.path=/tmp/x"], "disk.capacity: missing"),
        (["--config", "/no/such.toml"], "cannot be read"),
    ],
)
def test_serve_says_in_one_line_what_is_wrong(
    command: Callable[..., tuple[int, str, str]], arguments: list[str], words: str
) -> None:
    code, _, err = command("serve", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_serve_tells_systemd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve.notify("READY=1")  # not asked to: nothing to tell
    for address, name in (
        (f"{folder}/notify", f"{folder}/notify"),
        (f"\0kvstrata-{os.getpid()}", f"@kvstrata-{os.getpid()}"),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address)
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            serve.notify("READY=1")
            systemd.settimeout(5)
            assert systemd.recv(100) == b"READY=1"


# doctor


def examined(serving: Serving) -> dict[str, checks.Check]:
    return {check.name: check for check in doctor.examine(serving.config)}


def test_doctor_finds_a_good_node_good_and_leaves_nothing(
    serving: Serving, command: Callable[..., tuple[int, str, str]]
) -> None:
    found = examined(serving)
    failed = {name: check.message for name, check in found.items() if check.result == "FAIL"}
    assert failed == {}
    assert list(found)[-10:] == [
        "disk",
        "disk folder",
        "disk drive",
        "quarantine",
        "round trip",
        "host write",
        "host read",
        "disk write",
        "disk read",
        "clean up",
    ]
    assert all(found[name].measured["gb_per_s"] > 0 for name in ("host read", "disk read"))
    assert found["round trip"].measured["median_ms"] > 0
    assert objects(serving) == [0, 0]
    assert stored_files(serving) == []
    wait_for(lambda: serving.node.host.allocated_bytes == 0)  # a hit may still be verified
    code, out, _ = command("doctor", "--json", *serving.arguments)
    answer = json.loads(out)
    assert [check for check in answer["checks"] if check["result"] == "FAIL"] == []
    assert (code, answer["ok"]) == (0, True)
    assert [check["name"] for check in answer["checks"]] == list(found)
    code, out, _ = command("doctor", *serving.arguments)
    assert code == 0
    assert out.splitlines()[-1].startswith("KVStrata works")


def advance(steps: Iterator[checks.Check], name: str) -> None:
    """Let the round trip come to the check of this name; all before it must be good."""
    for check in steps:
        assert check.result == "ok", check
        if check.name == name:
            return
    pytest.fail(f"there was no check {name}")


def test_doctor_finds_a_corrupted_file(serving: Serving) -> None:
    client = serving.inprocess.connect()
    steps = round_trip.round_trip(client, serving.config)
    advance(steps, "disk write")
    damaged = stored_files(serving)[3]
    with open(damaged, "r+b") as file:
        file.seek(4096 + 17)
        byte = file.read(1)
        file.seek(4096 + 17)
        file.write(bytes([byte[0] ^ 1]))
    check = next(steps)
    assert (check.name, check.result) == ("disk read", "FAIL")
    assert "came back" in check.message
    assert "1 failed their checksum" in check.message
    assert next(steps).result == "ok"  # what is left is forgotten all the same
    client.close()
    assert objects(serving) == [0, 0]


def test_doctor_finds_files_removed(serving: Serving) -> None:
    client = serving.inprocess.connect()
    steps = round_trip.round_trip(client, serving.config)
    advance(steps, "disk write")
    for file in stored_files(serving):
        file.unlink()
    check = next(steps)
    assert (check.name, check.result) == ("disk read", "FAIL")
    assert "somebody removed them" in check.message
    client.close()


def test_doctor_finds_the_whole_folder_gone(serving: Serving) -> None:
    client = serving.inprocess.connect()
    steps = round_trip.round_trip(client, serving.config)
    advance(steps, "disk write")
    disk = serving.config.tier("disk")
    assert isinstance(disk, DiskConfig)
    shutil.rmtree(disk.path)
    check = next(steps)
    assert (check.name, check.result) == ("disk read", "FAIL")
    assert "vanished" in check.message
    check = next(steps)
    assert (check.name, check.result) == ("clean up", "warn")
    assert "stay until they are evicted" in check.message
    client.close()
    assert checks.check_folder(disk, 0).result == "FAIL"


def test_doctor_finds_other_bytes_in_host_memory(serving: Serving) -> None:
    client = serving.inprocess.connect()
    steps = round_trip.round_trip(client, serving.config)
    advance(steps, "host write")

    def damage() -> None:
        host = serving.node.host
        for _, slot in host.index.objects(next(iter(host.index.keys()))):
            host.pool.array(slot.offset + 5000, 1)[0] ^= 1

    serving.inprocess.run(damage)
    check = next(steps)
    assert (check.name, check.result) == ("host read", "FAIL")
    assert "OTHER bytes" in check.message
    client.close()


def test_doctor_finds_a_tier_that_takes_no_writes(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvstrata.tiers.disk.tier.os.pwritev", full)
    found = examined(serving)
    assert found["disk write"].result == "FAIL"
    assert "No space left on device" in found["disk write"].message
    assert found["clean up"].result == "ok"


def test_doctor_finds_a_read_only_folder(
    folder: Path, start: Callable[[dict[str, str]], Serving]
) -> None:
    start(settings(folder, node=f"unix:{folder}/first.sock")).close()  # makes the folder
    disk = folder / "disk"
    if os.getuid() == 0:
        os.chown(disk, 65534, -1)
    else:
        disk.chmod(0o500)
    try:
        found = examined(start(settings(folder)))
    finally:
        disk.chmod(0o700)
    assert found["disk write"].result == "FAIL"
    assert "read only" in found["disk write"].message
    assert found["host read"].result == "ok"


def test_doctor_says_that_a_scan_has_not_ended(
    folder: Path, start: Callable[[dict[str, str]], Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def scan(tier: Any) -> Iterator[Any]:
        while not ended.wait(0.05):
            yield []  # it does not hang, it takes long

    monkeypatch.setattr("kvstrata.tiers.disk.tier.DiskTier.scan", scan)
    monkeypatch.setattr("kvstrata.cli.canary.FIRST_WRITE_S", 1.0)
    serving = start(settings(folder, deadlines__load="1s"))
    found = examined(serving)
    ended.set()
    # What waited for the scan is written now: not while the folder is removed.
    client = serving.inprocess.connect()
    client.flush()
    client.close()
    for name in ("disk", "disk write"):
        assert found[name].result == "warn", found[name]
        assert "scan" in found[name].message
    assert found["host read"].result == "ok"


def test_doctor_says_when_reads_hang(
    folder: Path, start: Callable[[dict[str, str]], Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = start(settings(folder, deadlines__load="1s"))
    client = serving.inprocess.connect()
    steps = round_trip.round_trip(client, serving.config)
    advance(steps, "disk write")
    ended = threading.Event()

    def hangs(tier: DiskTier, ids: list[bytes], into: object) -> list[Outcome]:
        ended.wait(60)
        return [Outcome.MISS] * len(ids)

    monkeypatch.setattr(DiskTier, "read", hangs)
    check = next(steps)
    assert (check.name, check.result) == ("disk read", "FAIL")
    assert "0 of 16 chunks came back" in check.message or "only 0 of 16" in check.message
    ended.set()
    client.close()


def test_doctor_finds_a_folder_that_another_node_holds(
    folder: Path, serving: Serving, start: Callable[[dict[str, str]], Serving]
) -> None:
    second = start(settings(folder, node=f"unix:{folder}/second.sock"))
    found = examined(second)
    assert found["disk"].result == "FAIL"
    assert f"{folder}/disk is held by process {os.getpid()}" in found["disk"].message
    assert "belongs to one node" in found["disk"].message
    assert found["so far"].result == "warn"
    assert found["host read"].result == "ok"
    assert "disk read" not in found
    assert examined(serving)["disk read"].result == "ok"


def test_doctor_explains_a_node_that_is_not_there(
    folder: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command("doctor", "--node", f"unix:{folder}/none.sock")
    assert (code, err) == (1, "")
    assert "FAIL  node:" in out
    assert "kvstrata serve" in out
    code, out, _ = command("doctor", "--json", "--node", f"unix:{folder}/none.sock")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_doctor_explains_another_protocol(folder: Path) -> None:
    config = load_config(
        environ={}, overrides={"node": f"unix:{folder}/n.sock", "deadlines.attach": "5s"}
    )
    listener = bind(folder / "n.sock")
    memory = os.memfd_create("pool", os.MFD_ALLOW_SEALING)

    def answer() -> None:
        connected, _ = listener.accept()
        hello = p.Hello(999, "9.9.9", 1, bytes(16), 4096, [bytes(32)])
        with connected:
            socket.send_fds(connected, [p.encode(hello)], [memory])

    thread = threading.Thread(target=answer)
    thread.start()
    found = {check.name: check for check in doctor.examine(config)}
    thread.join()
    listener.close()
    os.close(memory)
    assert found["node"].result == "FAIL"
    assert "9.9.9" in found["node"].message
    assert "999" in found["node"].message


def test_doctor_survives_a_node_that_dies_in_the_middle(
    folder: Path, start: Callable[[dict[str, str]], Serving]
) -> None:
    serving = start(settings(folder))
    found = []
    for check in doctor.examine(serving.config):
        found.append(check)
        if check.name == "host write":
            serving.close()
    assert (found[-1].name, found[-1].result) == ("round trip", "FAIL")
    assert "NodeUnavailable" in found[-1].message


# single checks


def test_secret(folder: Path) -> None:
    file = folder / "secret"
    config = load_config(environ={}, overrides={"secret_file": str(file)})
    hello = p.Hello(1, kvstrata.__version__, 1, bytes(16), 4096, [bytes(32)])
    assert checks.check_secret(config, None).result == "ok"
    assert checks.check_secret(config, hello).result == "warn"
    assert not file.exists()  # looking makes nothing
    file.write_bytes(bytes(32))
    file.chmod(0o644)
    for known in (None, hello):
        check = checks.check_secret(config, known)
        assert check.result == "FAIL"
        assert "chmod 600" in check.message
    file.chmod(0o600)
    assert checks.check_secret(config, hello).result == "ok"
    file.write_bytes(b"x" * 32)
    check = checks.check_secret(config, hello)
    assert check.result == "warn"
    assert "another secret" in check.message
    file.write_bytes(b"x" * 32 + bytes(32))
    check = checks.check_secret(config, hello)
    assert (check.result, "restart the node" in check.message) == ("warn", True)
    knows_both = p.Hello(1, "1", 1, bytes(16), 4096, [b"x" * 32, bytes(32)])
    check = checks.check_secret(config, knows_both)
    assert (check.result, "two are known: stores use" in check.message) == ("ok", True)
    file.write_bytes(b"short")
    assert checks.check_secret(config, hello).result == "FAIL"


def test_socket(folder: Path) -> None:
    path = folder / "n.sock"
    assert checks.check_socket(path).result == "FAIL"
    bind(path).close()
    assert checks.check_socket(path).result == "ok"
    path.chmod(0o666)
    assert "0666" in checks.check_socket(path).message
    path.chmod(0o600)
    folder.chmod(0o777)
    assert "replace it" in checks.check_socket(path).message
    folder.chmod(0o1777)
    assert checks.check_socket(path).result == "ok"


def test_socket_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "n.sock"
    bind(path).close()
    owner = path.stat().st_uid
    monkeypatch.setattr("kvstrata.cli.checks.os.getuid", lambda: owner + 1)
    check = checks.check_socket(path)
    assert check.result == "FAIL"
    assert f"belongs to user {owner}" in check.message


def test_release() -> None:
    hello = p.Hello(1, kvstrata.__version__, 1, bytes(16), 4096, [bytes(32)])
    assert checks.check_release(hello).result == "ok"
    older = p.Hello(1, "0.0.9", 1, bytes(16), 4096, [bytes(32)])
    assert checks.check_release(older).result == "warn"
    assert "0.0.9" in checks.check_release(older).message


def host_state(capacity: int, populated: int, leased: int = 0) -> dict[str, Any]:
    return {
        "host": {"capacity_bytes": capacity, "populated_bytes": populated},
        "leases": {"bytes": leased},
    }


@pytest.mark.parametrize(
    ("state", "available", "result", "words"),
    [
        (host_state(1024 * MIB, 1024 * MIB), 0, "ok", "1GiB"),
        (host_state(1024 * MIB, 0), 1024 * MIB, "ok", "1GiB"),
        (host_state(1024 * MIB, 24 * MIB), 900 * MIB, "warn", "memory runs short"),
        (host_state(511 * MIB, 511 * MIB), 1024 * MIB, "warn", "only 511MiB"),
        (host_state(1024 * MIB, 1024 * MIB, 600 * MIB), MIB, "warn", "leased"),
    ],
)
def test_host(state: dict[str, Any], available: int, result: str, words: str) -> None:
    check = checks.check_host(state, available)
    assert check.result == result
    assert words in check.message


@pytest.mark.parametrize(
    ("how", "result"),
    [("ok", "ok"), ("scanning", "warn"), ("read only: full", "warn"), ("off: I/O error", "FAIL")],
)
def test_tier(how: str, result: str) -> None:
    check = checks.check_tier(
        {"name": "disk", "state": how, "num_objects": 3, "used_bytes": 5, "capacity_bytes": 9}
    )
    assert (check.name, check.result) == ("disk", result)
    assert how.partition(": ")[2] in check.message


@pytest.mark.parametrize(
    ("kind", "result", "words"),
    [("ext4", "ok", "ext4"), ("tmpfs", "warn", "memory"), ("nfs4", "warn", "network")],
)
def test_disk_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, result: str, words: str
) -> None:
    disk = load_config(environ={}, overrides=settings(folder)).tier("disk")
    assert isinstance(disk, DiskConfig)
    assert "does not exist" in checks.check_folder(disk, 0).message
    disk.path.mkdir()
    monkeypatch.setattr("kvstrata.tiers.disk.folder.file_system_of", lambda path: kind)
    check = checks.check_folder(disk, 0)
    assert check.result == result
    assert words in check.message


def test_disk_folder_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = load_config(environ={}, overrides=settings(folder)).tier("disk")
    assert isinstance(disk, DiskConfig)
    disk.path.mkdir()
    monkeypatch.setattr("kvstrata.tiers.disk.folder.file_system_of", lambda path: "ext4")
    free = os.statvfs_result((4096, 4096, 100, 100, 100, 0, 0, 0, 0, 255))
    monkeypatch.setattr("kvstrata.cli.checks.os.statvfs", lambda path: free)
    check = checks.check_folder(disk, 4 * MIB)
    assert check.result == "warn"
    assert "400KiB free" in check.message
    assert "60MiB" in check.message
    assert checks.check_folder(disk, 64 * MIB).result == "ok"


@pytest.mark.parametrize(
    ("version", "result"),
    [
        ("0.32.0", "ok"),
        ("0.32.0+cpu", "ok"),
        ("0.33.0", "warn"),
        ("0.32.1", "warn"),
        (None, "warn"),
    ],
)
def test_vllm(version: str | None, result: str) -> None:
    assert engines.check_vllm(version).result == result


@pytest.mark.parametrize(
    ("version", "plugins", "allowed", "result", "said"),
    [
        ("0.5.23", ["kvstrata"], "", "ok", "as tested"),
        ("0.5.23", ["kvstrata", "other"], "other, kvstrata", "ok", "kvstrata.connectors.sglang"),
        ("0.5.24", ["kvstrata"], "", "warn", "tested is 0.5.23"),
        ("0.5.23", [], "", "FAIL", "install it with the pip"),
        ("0.5.23", ["kvstrata"], "other", "FAIL", "add kvstrata to it"),
    ],
)
def test_sglang(
    version: str,
    plugins: list[str],
    allowed: str,
    result: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstrata.cli.engines.find_spec", lambda name: name)  # torch
    check = engines.check_sglang(version, plugins, allowed)
    assert check.result == result
    assert said in check.message.lower()


def test_past() -> None:
    fine = {"hit_chunks_total": 5, 'promotions_total{outcome="done"}': 7}
    assert checks.check_past(fine).result == "ok"
    assert checks.check_past({'promotions_total{outcome="failed"}': 1}).result == "warn"
    check = checks.check_past({'corrupt_objects_total{tier="disk"}': 2})
    assert check.result == "warn"
    assert "2 objects failed their checksum" in check.message


@given(
    st.integers(1 << 20, 1 << 42),
    st.none() | st.integers(1 << 20, 1 << 42),
    st.integers(1 << 20, 1 << 40),
    st.integers(1, 100),
)
def test_the_canary_crowds_nobody_out(
    capacity: int, disk: int | None, queue: int, percent: int
) -> None:
    overrides = {"leases.per_client": f"{percent}%", "leases.total": "100%"}
    config = load_config(environ={}, overrides=overrides, memory_bytes=1 << 43)
    state: dict[str, Any] = {"host": {"capacity_bytes": capacity}, "tiers": []}
    if disk is not None:
        state["tiers"].append({"capacity_bytes": disk})
    num_chunks, payload_bytes = round_trip.canary_size(state, config)
    assert payload_bytes >= 4096
    assert payload_bytes % 4096 == 0
    total_bytes = num_chunks * (payload_bytes + 4096)
    smallest = num_chunks * 8192  # with less nothing is tried at all
    assert total_bytes <= max(smallest, capacity // 4)
    assert total_bytes <= max(smallest, capacity * percent // 100)
    assert total_bytes <= max(smallest, (disk or capacity) // 4)


@pytest.mark.parametrize(
    ("counter", "result", "words"),
    [
        ('corrupt_objects_total{tier="disk"}', "FAIL", "checksum"),
        ('tier_trips_total{tier="disk"}', "FAIL", "error"),
        ('tier_writes_total{outcome="failed",tier="disk"}', "FAIL", "writes failed"),
        ('tier_reads_total{outcome="failed",tier="disk"}', "FAIL", "reads failed"),
        ('tier_reads_total{outcome="miss",tier="disk"}', "FAIL", "removed"),
        ('write_behind_skipped_total{tier="disk",why="queue"}', "warn", "queue is full"),
        ('matches_cut_total{why="leases"}', "warn", "leased"),
        ('evicted_chunks_total{tier="disk"}', "warn", "evicted"),
        ('hit_chunks_total{tier="disk"}', "FAIL", "no counter"),
    ],
)
def test_a_failed_step_is_explained_by_what_rose(counter: str, result: str, words: str) -> None:
    before: dict[str, Any] = {
        "host": {"capacity_bytes": 1 << 30, "num_evicted": 0},
        "leases": {"bytes": 0},
        "tiers": [{"name": "disk", "state": "ok"}],
        "counters": {counter: 5.0},
    }
    after = {**before, "counters": {counter: 6.0}}
    found, why = round_trip.diagnose(before, after, "disk")
    assert found == result
    assert words in why
    # What was counted before the step explains nothing.
    assert round_trip.diagnose(after, after, "disk") == (
        "FAIL",
        "no counter tells why; the node's log may",
    )


def test_what_is_still_being_written_is_a_warning() -> None:
    state: dict[str, Any] = {
        "host": {"capacity_bytes": 1 << 30, "num_evicted": 0},
        "leases": {"bytes": 0},
        "tiers": [{"name": "disk", "state": "ok", "queued_bytes": 3 << 20}],
        "counters": {},
    }
    found, why = round_trip.diagnose(state, state, "disk")
    assert found == "warn"
    assert "3MiB still wait to be written to the disk tier" in why


def test_doctor_waits_for_a_codec_that_is_compiled(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the node does, though it waits for loads less long."""
    waits = []
    flush = NodeClient.flush

    def asked(client: NodeClient, timeout_s: float = 60.0) -> None:
        waits.append(timeout_s)
        flush(client, timeout_s)

    monkeypatch.setattr(NodeClient, "flush", asked)
    client = serving.inprocess.connect()
    canary = Canary(client, 2, 4096, 10.0)
    assert not canary.store().problem
    assert not canary.write_behind().problem
    client.close()
    assert waits == [ENCODE_DEADLINE_S]


# metrics


def test_metrics_are_printed_as_prometheus_reads_them(serving: Serving, command: Any) -> None:
    client = serving.inprocess.connect()
    canary = Canary(client, 2, 4096, 10.0)
    assert not canary.store().problem
    client.close()
    status, out, _ = command("metrics", *serving.arguments)
    assert status == 0
    assert "\nkvstrata_stored_objects_total 2.0\n" in out
    assert 'kvstrata_tier_state{state="off",tier="disk"} 0.0\n' in out
    families = {family.name for family in text_string_to_metric_families(out)}
    assert {"kvstrata_host_capacity_bytes", "kvstrata_stored_objects"} <= families


def test_without_a_node_there_are_no_metrics(folder: Path, command: Any) -> None:
    status, out, err = command("metrics", f"--node=unix:{folder}/none.sock")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1


# documentation


def test_the_page_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    group = typer.main.get_command(cli.build_app())
    for name, found in group.commands.items():  # type: ignore[attr-defined]
        assert f"## kvstrata {name}" in page, name
        section = page.partition(f"## kvstrata {name}\n")[2].partition("\n## ")[0]
        for option in found.params:
            for spelling in option.opts:
                assert f"`{spelling}" in section or f"`{spelling}" in page.partition("\n## ")[0], (
                    f"{name} {spelling}"
                )
