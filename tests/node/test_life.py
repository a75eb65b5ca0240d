"""The life of an on-demand node: started once, ended after the last client, begun anew."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.node.conftest import Start, nodes_of, wait_for_end

from kvstrata.config import Config, load_config
from kvstrata.errors import NodeUnavailable
from kvstrata.wire.launch import connect
from kvstrata.wire.sockets import socket_path


def test_two_that_start_at_once_get_one_node(config: Config, start: Start) -> None:
    processes = [
        start("client = connect(config)\nsay(client.hello.pid)\nsys.stdin.read()\n")
        for _ in range(4)
    ]
    pids = {process.stdout.readline() for process in processes if process.stdout is not None}
    assert len(pids) == 1
    assert nodes_of(config) == [int(pids.pop())]


@pytest.mark.parametrize("how", ["bye", "killed", "exit"])
def test_it_ends_after_the_last_client(config: Config, start: Start, how: str) -> None:
    process = start(
        "client = hold()\nsay(client.hello.pid)\nsys.stdin.readline()\n"
        + ("client.close()\nsay('closed')\nsys.stdin.readline()\n" if how == "bye" else "")
    )
    assert process.stdout is not None
    assert process.stdin is not None
    pid = int(process.stdout.readline())
    second = connect(config)
    second.close()
    assert not wait_for_end(pid, 0.6), "it ended while a client lived"
    if how == "killed":
        process.kill()
    else:
        process.stdin.write("\n")
        process.stdin.flush()
    if how == "bye":
        assert process.stdout.readline() == "closed\n"
    begun = time.monotonic()
    assert wait_for_end(pid, 5.0)
    assert time.monotonic() - begun >= 0.2, "it did not linger"
    assert not socket_path(config).exists()


def test_it_lingers_after_the_last_client_not_the_first(config: Config) -> None:
    config = replace(config, linger=0.8)
    client = connect(config)
    pid = client.hello.pid
    client.close()
    wait_for_end(pid, 0.5)
    client = connect(config)  # before the first one's time is over
    client.close()
    assert client.hello.pid == pid
    assert not wait_for_end(pid, 0.6), "the first client's time ended it"
    assert wait_for_end(pid, 5.0)


def test_a_client_that_comes_while_it_ends(config: Config, tmp_path: Path) -> None:
    """It gets a new node, which waits until the old one has let go of everything."""
    config = load_config(
        environ={},
        overrides={
            **config.to_dict(),
            "disk.path": str(tmp_path / "disk"),
            "disk.capacity": "1MiB",
        },
    )
    pids = set()
    for _ in range(4):
        client = connect(config)
        pids.add(client.hello.pid)
        assert [tier["name"] for tier in client.status()["tiers"]] == ["disk"], "two had the folder"
        os.kill(client.hello.pid, 15)
        with contextlib.suppress(NodeUnavailable):
            while True:
                client.status()
        client.close()
    assert len(pids) == 4
    last = connect(config)
    last.close()


def test_clients_that_come_and_go_at_any_moment(config: Config) -> None:
    config = replace(config, linger=0.0)
    for _ in range(15):
        client = connect(config)
        with contextlib.suppress(NodeUnavailable):  # it may have been the last moment
            client.status()
        client.close()


def test_socket_and_folder_are_the_users_alone(config: Config) -> None:
    client = connect(config)
    path = socket_path(config)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    client.close()


def test_a_dead_nodes_socket_is_in_nobodys_way(config: Config) -> None:
    client = connect(config)
    os.kill(client.hello.pid, 9)
    wait_for_end(client.hello.pid, 5)
    assert socket_path(config).exists()
    again = connect(config)
    assert again.hello.pid != client.hello.pid
    client.close()
    again.close()


def test_a_node_that_cannot_start_says_why(config: Config, tmp_path: Path) -> None:
    secret = tmp_path / "other"
    secret.write_bytes(bytes(32))
    secret.chmod(0o644)
    with pytest.raises(NodeUnavailable, match=r"others may use the secret.*\.log\)"):
        connect(replace(config, secret_file=secret))


def test_without_auto_nothing_is_started(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with pytest.raises(NodeUnavailable, match=re.escape(f"no node answers on {path}")):
        connect(replace(config, node=f"unix:{path}"))
    assert not list(tmp_path.glob("nobody*"))


def test_a_node_that_answers_nothing_costs_the_deadline_only(config: Config) -> None:
    client = connect(config)
    os.kill(client.hello.pid, 19)
    try:
        begun = time.monotonic()
        with pytest.raises(NodeUnavailable):
            connect(config, timeout_s=0.5)
        assert time.monotonic() - begun < 3.0
    finally:
        os.kill(client.hello.pid, 18)
    assert client.status()["pid"] == client.hello.pid
    client.close()


def test_the_node_leaves_the_starters_core(config: Config) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        client = connect(config)
        assert os.sched_getaffinity(client.hello.pid) == before
        client.close()
    finally:
        os.sched_setaffinity(0, before)
