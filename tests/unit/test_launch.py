"""Joining and starting a node: what is said when it fails. Real processes: tests/node."""

from __future__ import annotations

import ast
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.config import Config, load_config
from kvstrata.errors import ConfigError, NodeUnavailable
from kvstrata.node.process.run import bind
from kvstrata.wire import launch
from kvstrata.wire.sockets import beside, prepare_folder, socket_path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return load_config(environ={}, overrides={"secret_file": str(tmp_path / "secret")})


def start_with(
    monkeypatch: pytest.MonkeyPatch, config: Config, error: Exception, words: str | None
) -> None:
    def run(*_: object, **__: object) -> None:
        if words is not None:
            beside(socket_path(config), ".log").write_text(words)
        raise error

    monkeypatch.setattr(subprocess, "run", run)


def test_the_last_line_of_the_log_is_the_reason(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CalledProcessError(2, "node")
    start_with(monkeypatch, config, failed, "first\nno memory for the pool\n\n")
    with pytest.raises(NodeUnavailable, match="did not start: no memory for the pool"):
        launch.connect(config, 1.0)
    start_with(monkeypatch, config, failed, "")
    with pytest.raises(NodeUnavailable, match="no word in its log"):
        launch.connect(config, 1.0)


def test_a_node_that_does_not_come_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    start_with(monkeypatch, config, subprocess.TimeoutExpired("node", 1), None)
    with pytest.raises(NodeUnavailable, match="does not come up"):
        launch.connect(config, 1.0)


def test_somebody_else_is_starting_it_for_too_long(config: Config) -> None:
    import fcntl

    path = socket_path(config)
    prepare_folder(path.parent)
    with open(beside(path, ".start"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NodeUnavailable, match="somebody else is starting the node"):
            launch.connect(config, 0.05)


def test_no_node_hangs_up(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with bind(path) as listener:
        listener.close()
        with pytest.raises(NodeUnavailable, match=r"no node answers on .*x\.sock"):
            launch.connect(load_config(environ={}, overrides={"node": f"unix:{path}"}), 1.0)


def test_a_bound_socket_is_private_and_replaces_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    mask = os.umask(0)
    try:
        bind(path).close()
        with bind(path), socket.socket(socket.AF_UNIX) as client:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            client.connect(str(path))
    finally:
        os.umask(mask)
    with pytest.raises(OSError, match="too long"):
        bind(tmp_path / ("x" * 120))


def test_nothing_but_a_dead_socket_of_ours_is_removed(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.pdf"
    thesis.write_text("years of work")
    with pytest.raises(ConfigError, match="is no socket: it is left alone"):
        bind(thesis)
    assert thesis.read_text() == "years of work"
    link = tmp_path / "link.sock"
    link.symlink_to(thesis)
    with pytest.raises(ConfigError, match="is no socket"):
        bind(link)
    assert link.is_symlink()
    alive = tmp_path / "alive.sock"
    with bind(alive), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConfigError, match="somebody listens"):
            bind(alive)
        client.connect(str(alive))


def test_somebody_elses_socket_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sock"
    bind(path).close()
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 7)
    with pytest.raises(ConfigError, match="is a socket of user"):
        bind(path)
    assert path.is_socket()


def test_sockets_of_like_names_have_files_of_their_own(tmp_path: Path) -> None:
    first, second = tmp_path / "kv.gpu0", tmp_path / "kv.gpu1"
    assert beside(first, ".lock") != beside(second, ".lock")
    assert beside(first, ".lock") == tmp_path / "kv.gpu0.lock"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("operator_binds", [False, True])
def test_a_node_has_the_cores_of_its_engine_and_not_of_one_thread(operator_binds: bool) -> None:
    """An engine's thread that bound itself starts the node: it may use what the operator gave."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    given = {first} if operator_binds else {first, second}
    code = (
        "import os, subprocess, sys; "
        f"child = 'import os; os.sched_setaffinity(0, {{{first}}}); "
        'import subprocess, sys; subprocess.run([sys.executable, "-c", sys.argv[1]])\'; '
        "node = 'from kvstrata.cores import given_cores; print(given_cores())'; "
        "subprocess.run([sys.executable, '-c', child, node])"
    )
    # As a script starts an engine: the shell has all cores, and is in the same process group.
    cores = ",".join(map(str, given))
    said = subprocess.run(
        ["sh", "-c", f"taskset -c {cores} '{sys.executable}' -c \"$1\"; true", "sh", code],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ast.literal_eval(said) == given


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_thread_of_an_engine_that_bound_itself_has_the_cores_of_the_others() -> None:
    code = (
        "import os, threading; from kvstrata.cores import given_cores; "
        "given = os.sched_getaffinity(0); ended = threading.Event(); "
        "threading.Thread(target=ended.wait, daemon=True).start(); "
        "os.sched_setaffinity(0, {min(given)}); print(given_cores() == given)"
    )
    said = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -c \"$1\"; true", "sh", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "True\n"


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_folder(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make the folder"):
        prepare_folder(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 7)
    if os.stat(tmp_path).st_uid:
        with pytest.raises(ConfigError, match="belongs to user"):
            prepare_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host.capacity": "much"}, "host.capacity: "),  # before it forks
        ({}, "others may use the secret"),  # and after
    ],
)
def test_a_node_that_cannot_start_says_so_in_one_line(
    config: Config, changes: dict[str, str], why: str
) -> None:
    config.secret_file.write_bytes(bytes(32))
    config.secret_file.chmod(0o644)
    ended = subprocess.run(
        [sys.executable, "-m", "kvstrata.node.process.run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        input=json.dumps({**config.to_dict(), **changes}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("kvstrata node: ")
    assert why in line
