"""On-demand nodes of real processes, each in a folder of its own, gone at the end of its test."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstrata.config import Config, load_config
from kvstrata.wire.sockets import beside, socket_path

Start = Callable[[str], "subprocess.Popen[str]"]

PRELUDE = """
import os, sys, time, signal
from kvstrata.wire.client import offsets_of
from kvstrata.config import load_config
from kvstrata.wire.launch import connect
from kvstrata.objects import HEADER_BYTES, checksum
from tests.support.nodes import *
import json
config = load_config(environ={}, overrides=json.loads(sys.argv[1]))
keys = chunk_keys(4, os.getpid())

def say(*words):
    print(*words, flush=True)

def hold():
    client = connect(config)
    reserved = client.reserve(NAMESPACE, keys, 0, 0, template()).wait(10)
    sums = []
    for key, offset in zip(keys, offsets_of(reserved.offsets)):
        client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
        sums.append(checksum(payload(key)))
    assert client.commit(reserved.reservation, sums).wait(10).count == 4
    assert client.match(keys, [0], [ORDER], [RAW]).wait(10).lease
    more = chunk_keys(2, -os.getpid())
    client.reserved = client.reserve(NAMESPACE, more, 0, 0, template()).wait(10)
    return client
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A configuration whose on-demand node nobody else shares; the node is ended at the end."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    config = load_config(
        environ={},
        overrides={
            "host.capacity": "1MiB",
            "linger": "300ms",
            "secret_file": str(tmp_path / "secret"),
            "deadlines.attach": "20s",
        },
    )
    yield config
    for pid in nodes_of(config):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


@pytest.fixture
def start(config: Config) -> Iterator[Start]:
    """Start a client process with this code after the prelude; killed at the end."""
    processes: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), json.dumps(config.to_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def nodes_of(config: Config) -> list[int]:
    """Processes that have this configuration's log open: its nodes."""
    log = str(beside(socket_path(config), ".log"))
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/fd/2") == log:
                    found.append(int(entry))
    return found


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Whether the process is dead within this time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)
