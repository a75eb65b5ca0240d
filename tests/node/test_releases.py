"""The last release beside this one: on one socket they part in words, on one disk they miss or hit.

``tests/releases`` has its sources as they were released, without what neither node nor connector
needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.releases import serve_released, unpack

from kvstrata.config import load_config
from kvstrata.errors import Incompatible
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

RAW = 50_000
KEYS = [bytes([number]) * 32 for number in range(1, 6)]
ORDER = "test/order"
NAMESPACE = bytes(32)
TIMEOUT_S = 30.0

# Written against 0.1.0: its modules lie elsewhere.
OLD = """
import hashlib, json, sys, time
from kvstrata.client import offsets_of
from kvstrata.config import load_config
from kvstrata.errors import KVStrataError
from kvstrata.node import protocol as p
from kvstrata.node.inprocess import InProcessNode
from kvstrata.node.launch import connect
from kvstrata.objects import HEADER_BYTES, checksum

config = load_config(environ={}, overrides=json.loads(sys.argv[1]))
keys = [bytes.fromhex(key) for key in json.loads(sys.argv[2])]
RAW = 50_000

def payload(key):
    return hashlib.shake_128(key).digest(RAW)

def store(client):
    template = p.Template("native", "test/order", "bfloat16", [1, RAW], 128, RAW)
    reserved = client.reserve(bytes(32), keys, 0, 0, template).wait(30)
    sums = []
    for key, offset in zip(keys, offsets_of(reserved.offsets)):
        if offset >= 0:
            client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
        sums.append(checksum(payload(key)) if offset >= 0 else bytes(16))
    count = client.commit(reserved.reservation, sums).wait(30).count
    client.flush()
    return count

def load(client):
    matched = client.match(keys, [0], ["test/order"], [RAW]).wait(30)
    have, failed, offsets = 0, False, []
    while matched.lease and have < len(matched.tiers) and not failed:
        arrived = client.await_arrival(matched.lease, have).wait(30)
        have, failed = arrived.ready, arrived.failed
        offsets += offsets_of(arrived.offsets)
    for key, offset in zip(keys, offsets):
        assert bytes(client.pool.view(offset + HEADER_BYTES, RAW)) == payload(key)
    client.release(matched.lease)
    return have

def scanned(client):
    while client.status()["tiers"][0]["state"] == "scanning":
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released sources."""
    return unpack(tmp_path_factory.mktemp("release"))


def run_old(old: Path, code: str, options: dict[str, Any]) -> str:
    """What a program of the released KVStrata prints."""
    keys = json.dumps([key.hex() for key in KEYS])
    return subprocess.run(
        [sys.executable, "-c", OLD + code, json.dumps(options), keys],
        env={**os.environ, "PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.strip()


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "node": f"unix:{tmp_path}/node.sock",
        "secret_file": str(tmp_path / "secret"),
        "host.capacity": "16MiB",
        "disk.path": str(tmp_path / "disk"),
        "disk.capacity": "16MiB",
        "disk.codec": "raw",
    }


@contextlib.contextmanager
def node_of_now(options: dict[str, Any]) -> Iterator[NodeClient]:
    with InProcessNode(load_config(environ={}, overrides=options)) as node:
        client = node.connect()
        try:
            while client.status()["tiers"][0]["state"] == "scanning":
                time.sleep(0.01)
            yield client
        finally:
            client.close()


def payload(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(RAW)


def store(client: NodeClient) -> int:
    template = p.Template("native", ORDER, "bfloat16", [1, RAW], 128, RAW)
    reserved: p.Reserved = client.reserve(NAMESPACE, KEYS, 0, 0, template).wait(TIMEOUT_S)
    for key, offset in zip(KEYS, offsets_of(reserved.offsets), strict=True):
        client.pool.view(offset + HEADER_BYTES, RAW)[:] = payload(key)
    sums = [checksum(payload(key)) for key in KEYS]
    done: p.Done = client.commit(reserved.reservation, sums).wait(TIMEOUT_S)
    client.flush()
    return done.count


def test_an_old_node_and_a_new_client_part_in_words(old: Path, options: dict[str, Any]) -> None:
    serve_released(old, options)
    with pytest.raises(Incompatible, match=r"the node \(KVStrata 0\.1\.0\) speaks protocol 1"):
        connect(load_config(environ={}, overrides=options))
    # It still serves its own, and ends as its operator ends it.
    said = run_old(old, "client = connect(config); print(store(client), load(client), "
                   "client.status()['pid']); client.close()", options)  # fmt: skip
    *counts, pid = map(int, said.split())
    assert counts == [len(KEYS), len(KEYS)]
    os.kill(pid, 15)


def test_a_new_node_and_an_old_client_part_in_words(old: Path, options: dict[str, Any]) -> None:
    asking = (
        "\ntry:\n    connect(config)\nexcept KVStrataError as error:\n"
        "    print(type(error).__name__, error)"
    )
    serving = subprocess.run(
        [sys.executable, "-m", "kvstrata.node.process.run"],
        input=json.dumps({**options, "linger": "60s"}),
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        text=True,
        timeout=60,
        check=False,
    )
    assert serving.returncode == 0
    said = run_old(old, asking, options)
    assert said.startswith("Incompatible the node (KVStrata ")
    assert "speaks protocol 2, this client (KVStrata 0.1.0) 1" in said
    client = connect(load_config(environ={}, overrides=options))
    assert store(client) == len(KEYS), "and it still serves its own"
    pid = client.hello.pid
    client.close()
    os.kill(pid, 15)


def test_what_the_last_release_left_on_disk_hits(old: Path, options: dict[str, Any]) -> None:
    code = (
        "\nwith InProcessNode(config) as node:\n    client = node.connect(); print(store(client))"
    )
    assert int(run_old(old, code, options)) == len(KEYS)
    with node_of_now(options) as client:
        matched: p.Matched = client.match(KEYS, [0], [ORDER], [RAW]).wait(TIMEOUT_S)
        assert len(matched.tiers) == len(KEYS)
        have = 0
        while have < len(KEYS):
            arrived: p.Arrived = client.await_arrival(matched.lease, have).wait(TIMEOUT_S)
            assert not arrived.failed
            for key, offset in zip(KEYS[have:], offsets_of(arrived.offsets), strict=False):
                assert client.pool.view(offset + HEADER_BYTES, RAW) == payload(key)
                header = decode(client.pool.view(offset, HEADER_BYTES))
                assert (header.key, header.chunk_tokens, header.owner) == (key, 128, bytes(16))
            have = arrived.ready
        counters = client.status()["counters"]
        assert not any(name.startswith("corrupt_objects_total") for name in counters), counters


def test_the_last_release_misses_what_this_one_left(old: Path, options: dict[str, Any]) -> None:
    with node_of_now(options) as client:
        assert store(client) == len(KEYS)
    code = """
with InProcessNode(config) as node:
    client = node.connect()
    scanned(client)
    while (found := load(client)) or any(tier != p.ABSENT for tier in client.lookup(keys, [0])):
        assert not found, "an object that it does not know"
    print(store(client), load(client))
"""
    assert run_old(old, code, options) == f"{len(KEYS)} {len(KEYS)}", "it stores them anew"
    assert list((Path(options["disk.path"]) / "quarantine").iterdir())
