"""What the doctor says of the machine and of what stands beside the node, with each fault real."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.apis import Rig
from tests.support.attached import secret_in
from tests.support.mounts import SOURCES, in_private_mount
from tests.support.registries import Fleet, fleet_in

import kvstrata
from kvstrata.cli import machine, services
from kvstrata.cli.checks import Check
from kvstrata.config import Config, load_config
from kvstrata.fleet.members import Model
from kvstrata.memory import mapping
from kvstrata.testing.servers.redis import installed

LIMITED = """
import resource, time
resource.setrlimit(resource.{}, ({}, {}))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture
def limited() -> Iterator[Callable[[str, int], int]]:
    """Processes that live under a limit; the pid of each."""
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str, limit: int) -> int:
        code = LIMITED.format(what, limit, limit)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def configured(**options: str) -> Config:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return load_config(environ={}, overrides=given, memory_bytes=1 << 40)


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# limits


def test_few_descriptors(limited: Callable[[str, int], int]) -> None:
    few = by_name(machine.check_limits(limited("RLIMIT_NOFILE", 64), configured(), 0))
    assert list(few) == ["descriptors"], "nothing registers memory here"
    assert few["descriptors"].result == "warn"
    assert few["descriptors"].measured["limit"] == 64
    assert "LimitNOFILE=65536" in few["descriptors"].message
    enough = by_name(machine.check_limits(limited("RLIMIT_NOFILE", 4096), configured(), 0))
    assert enough["descriptors"].result == "ok"
    assert re.match(r"\d+ of 4096 files open", enough["descriptors"].message)


def test_descriptors_that_are_nearly_used_up() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    limit = 2048
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(limit * 3 // 4 - used + 16)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        (check,) = machine.check_limits(os.getpid(), configured(), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            os.close(file)
    assert (check.result, check.measured["limit"]) == ("warn", limit)


@pytest.mark.parametrize(
    "options",
    [
        {"network__transport": "nixl", "network__trusted": "yes, I trust this network"},
        {"mooncake__master": "127.0.0.1:50051", "mooncake__protocol": "rdma"},
    ],
)
def test_too_little_locked_memory(
    options: dict[str, str], limited: Callable[[str, int], int]
) -> None:
    pid, config = limited("RLIMIT_MEMLOCK", 64 << 10), configured(**options)
    small = by_name(machine.check_limits(pid, config, 64 << 10))
    assert small["locked memory"].result == "ok"
    large = by_name(machine.check_limits(pid, config, (64 << 10) + 1))
    assert large["locked memory"].result == "warn"
    assert "LimitMEMLOCK=infinity" in large["locked memory"].message
    assert "64KiB" in large["locked memory"].message


def test_a_node_that_cannot_be_looked_at() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (check,) = machine.check_limits(gone.pid, configured(), 0)
    assert (check.name, check.result) == ("limits", "warn")


# huge pages


def test_huge_pages_that_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import ctypes; assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0\n"  # PR_SET_THP_DISABLE
        "from kvstrata.cli.machine import check_huge_pages as check; print(*vars(check()).values())"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert said.startswith("huge pages warn ")
    assert "shmem_enabled" in said
    monkeypatch.setattr(mapping, "collapse", lambda _: True)
    assert machine.check_huge_pages().result == "ok"


# the drive


def clock_of(*seconds: float) -> Callable[[], float]:
    """Tells these times, one after the other."""
    times = iter(seconds)
    return lambda: next(times)


def test_speed_of_a_drive(tmp_path: Path) -> None:
    fast = machine.check_drive(tmp_path, clock_of(0.0, 0.01, 0.03))
    if fast.message.startswith("not looked at"):
        pytest.skip("the file system has no files without a name")
    nbytes = machine.LOOK_BYTES
    assert fast.result == "ok"
    assert fast.measured["write_gb_per_s"] == pytest.approx(nbytes / 0.01e9)
    assert fast.measured["read_gb_per_s"] == pytest.approx(nbytes / 0.02e9)
    for slow in (clock_of(0.0, 1.0, 1.01), clock_of(0.0, 0.01, 1.01)):
        check = machine.check_drive(tmp_path, slow)
        assert check.result == "warn"
        assert "NVMe" in check.message
    assert list(tmp_path.iterdir()) == []


def test_a_drive_that_takes_no_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    check = machine.check_drive(tmp_path)
    assert check.result == "warn"
    assert "O_DIRECT" in check.message


def test_a_full_drive(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvstrata.cli.machine import check_drive\n"
        "print(*vars(check_drive(Path(sys.argv[1]))).values())"
    )
    status, out, err = in_private_mount(code, tmp_path / "full", "size=1m")
    assert (status, err) == (0, "")
    assert out.startswith("disk drive FAIL ")
    assert "No space left on device; make room, or lower disk.capacity" in out


def test_a_drive_where_nothing_can_be_made(tmp_path: Path) -> None:
    check = machine.check_drive(tmp_path / "none")
    assert check.result == "FAIL"
    assert "no file can be made" in check.message


def test_quarantine(tmp_path: Path) -> None:
    assert machine.check_quarantine(tmp_path).result == "ok"
    (tmp_path / "quarantine").mkdir()
    assert machine.check_quarantine(tmp_path).result == "ok"
    for name in ("a.kvo", "b.kvo"):
        (tmp_path / "quarantine" / name).write_bytes(b"x")
    os.utime(tmp_path / "quarantine" / "a.kvo", (1e9, 1e9))
    os.utime(tmp_path / "quarantine" / "b.kvo", (5e8, 5e8))
    check = machine.check_quarantine(tmp_path)
    assert check.result == "warn"
    assert check.message.startswith("2 objects")
    assert time.strftime("%Y-%m-%d %H:%M", time.localtime(1e9)) in check.message
    assert "kvstrata scrub disk" in check.message


# clocks, the registry


@pytest.mark.parametrize(
    ("there", "result", "word"),
    [
        (1001.9, "ok", ""),
        (1002.1, "warn", "ahead of"),
        (998.1, "ok", ""),
        (997.9, "warn", "behind"),
    ],
)
def test_a_clock_that_is_wrong(there: float, result: str, word: str) -> None:
    check = services.check_clock("store", lambda: there, clock_of(1000.0, 1000.0))
    assert (check.name, check.result) == ("store clock", result)
    assert word in check.message
    assert check.measured["skew_s"] == pytest.approx(abs(there - 1000), abs=1e-3)


def test_a_slow_answer_is_no_wrong_clock() -> None:
    slow = services.check_clock("store", lambda: 1005.0, clock_of(1000.0, 1010.0))
    assert (slow.result, slow.measured["skew_s"]) == ("ok", 0.0)


@pytest.fixture
def fleet(folder: Path) -> Iterator[Fleet]:
    if not installed():
        pytest.skip("there is no redis-server here")
    with fleet_in(folder) as made:
        yield made


def test_a_fleet(fleet: Fleet, folder: Path) -> None:
    node = fleet.join("one")
    config = replace(node.inprocess.config, api=configured().api)
    store = configured(redis__url=fleet.server.url, secret_file=str(secret_in(folder)))
    config = replace(config, tiers=store.tiers)
    state = node.client.status()

    def examine(**more: Any) -> dict[str, Check]:
        return by_name(services.check_services(config, state, **more))

    found = examine()
    assert list(found) == ["redis clock", "registry", "registry clock"]
    assert {check.result for check in found.values()} == {"ok"}
    assert "alone" in found["registry"].message

    wrong = examine(clock=lambda: time.time() - 100)
    for name in ("redis clock", "registry clock"):
        assert wrong[name].result == "warn"
        assert "100.0 s ahead of ours" in wrong[name].message
        assert "one time server" in wrong[name].message
    assert "dated by the registry's" in wrong["registry clock"].message
    assert "has no registry" in wrong["redis clock"].message

    other = msgspec.structs.replace(fleet.members()["one"], name="two", release="9.9.9")
    fleet.registry.renew(other, 30.0, 0)
    check = examine()["registry"]
    assert check.result == "warn"
    assert "two runs 9.9.9" in check.message

    assert "not registered" in services._check_members(list(fleet.members().values()), "x").message

    fleet.server.close()
    lost = examine()
    assert lost["registry"].result == "FAIL"
    assert "fleet.registry" in lost["registry"].message
    assert lost["redis clock"].result == "warn"


def test_members_that_have_nothing_in_common(fleet: Fleet) -> None:
    fleet.join("one")
    one = msgspec.structs.replace(fleet.members()["one"], models=[Model("aa"), Model("bb")])
    two = msgspec.structs.replace(
        fleet.members()["one"], name="two", models=[Model("bb"), Model("cc")]
    )
    new = msgspec.structs.replace(one, name="new", models=[])  # no engine has asked it yet
    assert services._check_members([one, two, new], "one").result == "ok"
    assert services._check_members([one, two, new], "new").result == "ok"
    three = msgspec.structs.replace(fleet.members()["one"], name="three", models=[Model("cc")])
    check = services._check_members([one, two, three], "one")
    assert check.result == "warn"
    assert "three has no namespace in common" in check.message
    assert "two" not in check.message
    assert "doctor --against" in check.message


# the API


def test_the_api(folder: Path) -> None:
    rig = Rig(folder)
    try:
        config = load_config(
            environ={}, overrides={**rig.options, "api.listen": f"127.0.0.1:{rig.port}"}
        )
        with rig.client() as client:
            state = client.status().model_dump()
        good = by_name(services.check_services(config, state))
        assert [(check.name, check.result) for check in good.values()] == [("api", "ok")]
        another = services.check_api(config, {**state, "pid": 1})
        assert another.result == "FAIL"
        assert "its own api.listen" in another.message
        older = services.check_api(config, {**state, "release": "9.9.9"})
        assert older.result == "warn"
        assert kvstrata.__version__ in older.message
    finally:
        rig.close()
    nobody = services.check_api(config, state)
    assert nobody.result == "FAIL"
    assert "kvstrata serve --api" in nobody.message
