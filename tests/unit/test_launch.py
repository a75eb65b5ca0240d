"""Joining and starting a node: what is said when it fails. Real processes: tests/node."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from kvstrata.config import Config, load_config
from kvstrata.errors import ConfigError, NodeUnavailable
from kvstrata.node.process.run import bind
from kvstrata.wire import launch
from kvstrata.wire.sockets import prepare_folder, socket_path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return load_config(environ={}, overrides={"secret_file": str(tmp_path / "secret")})


def start_with(
    monkeypatch: pytest.MonkeyPatch, config: Config, error: Exception, words: str | None
) -> None:
    def run(*_: object, **__: object) -> None:
        if words is not None:
            socket_path(config).with_suffix(".log").write_text(words)
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
    with open(path.with_suffix(".start"), "w") as lock:
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
