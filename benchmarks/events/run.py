"""How far do a node's events lag behind it, in the registry and over vLLM's ZMQ?"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, expect, main, say

from kvstrata.config import load_config
from kvstrata.errors import KVStrataError
from kvstrata.fleet import events
from kvstrata.fleet.registry import Registry
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.testing.servers.redis import RedisServer
from kvstrata.testing.workplace import wait_ready
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.client import Client
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

NAME = "events"
RATE, BATCH = 2000, 20
"""Chunks stored a second, and in one commit."""
NBYTES = 4096
NAMESPACE, ORDER = bytes(range(32)), "benchmark/events"
STEP_S = 0.02
"""Between two steps of the engine, after which vLLM publishes."""
BLOCKS, BLOCK = 8, 16
REQUIRED_S = 0.25


class Node:
    """A node of a fleet in a process of its own, and a client of it."""

    def __init__(self, folder: Path, url: str) -> None:
        at = folder / "node.sock"
        self.options = {
            "node": f"unix:{at}",
            "host.capacity": "512MiB",
            "secret_file": str(folder / "secret"),
            "fleet.registry": url,
            "fleet.name": "storing",
        }
        sets = [word for key, value in self.options.items() for word in ("--set", f"{key}={value}")]
        with open(folder / "node.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvstrata.cli", "serve", *sets],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("serving on "):
                break
        self.client = self.connect()
        wait_ready(self.client)

    def connect(self) -> NodeClient:
        return connect(load_config(environ={}, overrides=self.options))

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.communicate()


def store(client: NodeClient, keys: list[bytes]) -> float:
    """Store some chunks; when they were there."""
    template = p.Template("native", ORDER, "uint8", [1, NBYTES], 128, NBYTES)
    reserved = client.reserve(NAMESPACE, keys, 0, 0, template).wait(30.0)
    data = keys[0] * (NBYTES // 32)
    for offset in offsets_of(reserved.offsets):
        client.pool.view(offset + HEADER_BYTES, NBYTES)[:] = data
    client.commit(reserved.reservation, [checksum(data)] * len(keys)).wait(30.0)
    return time.time()


def storing(
    node: Node, seconds: float, rng: np.random.Generator, told: Callable[[list[bytes]], None]
) -> dict[bytes, float]:
    """Store at the rate for so long; when each chunk was there."""
    stored: dict[bytes, float] = {}
    begun = time.perf_counter()
    for number in range(int(seconds * RATE / BATCH)):
        keys = [rng.bytes(32) for _ in range(BATCH)]
        told(keys)
        stored |= dict.fromkeys(keys, store(node.client, keys))
        time.sleep(max(0.0, begun + (number + 1) * BATCH / RATE - time.perf_counter()))
    took = time.perf_counter() - begun
    say(f"stored {len(stored) / took:.0f} chunks/s for {took:.1f} s")
    return stored


class Hearing:
    """Notes when each key was heard of, on a thread of its own."""

    def __init__(self, hear: Callable[[], Iterator[bytes]]) -> None:
        self.heard: dict[bytes, float] = {}
        self._hear = hear
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.is_set():
            for key in self._hear():
                self.heard.setdefault(key, time.time())

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 30.0
        while len(self.heard) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        self._done.set()
        self._thread.join()


def row(what: str, stored: dict[bytes, float], heard: dict[bytes, float], detail: str) -> Row:
    lags = [heard[key] - at for key, at in stored.items()]
    p50, p99 = (1e3 * max(0.0, float(np.percentile(lags, q))) for q in (50, 99))
    detail = f"p50 {p50:.0f} ms, {len(stored)} chunks; {detail}"
    return Row(NAME, what, p99, 1e3 * REQUIRED_S, unit="ms", detail=detail)


def in_registry(node: Node, registry: Registry, seconds: float, rng: np.random.Generator) -> Row:
    reader = events.Reader(registry, "storing")

    def hear() -> Iterator[bytes]:
        entries = reader.read()
        if not entries:
            time.sleep(0.005)
        yield from stored_in(entries)

    hearing = Hearing(hear)
    stored = storing(node, seconds, rng, lambda keys: None)
    hearing.until(len(stored))
    # And by one that comes afterwards, from the beginning on.
    late, replayed = events.Reader(registry, "storing"), set()
    while entries := late.read():
        expect(not any(entry.gap for entry in entries), "an event is missing")
        replayed |= set(stored_in(entries))
    expect(stored.keys() <= replayed, f"{len(stored.keys() - replayed)} chunks are in no event")
    expect(stored.keys() <= hearing.heard.keys(), "an event was not heard")
    return row("events in the registry, p99 behind the commit", stored, hearing.heard,
               "none lost after replay")  # fmt: skip


def stored_in(entries: list[events.Entry]) -> Iterator[bytes]:
    for entry in entries:
        for event in entry.batch.events:
            if event.what == events.STORED:
                yield from (event.keys[i : i + 32] for i in range(0, len(event.keys), 32))


def over_zmq(node: Node, folder: Path, seconds: float, rng: np.random.Generator) -> Row:
    """The connector's own code and vLLM's publisher, with an engine that only makes steps."""
    import msgspec
    import zmq
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    from kvstrata.connectors.vllm.events import Events, NodeWatch, Shape

    told = Events(Shape(BLOCKS * BLOCK, BLOCK, BLOCK, "full_attention"))
    watch = NodeWatch(load_config(environ={}, overrides=node.options), told)
    decode = msgspec.msgpack.Decoder(KVEventBatch).decode
    key_of: dict[Any, bytes] = {}
    with contextlib.ExitStack() as ends:
        publisher = ZmqEventPublisher(0, f"ipc://{folder}/events", f"ipc://{folder}/replay")
        ends.callback(publisher.shutdown)
        context = zmq.Context()
        ends.callback(context.destroy, 0)
        sub = ends.enter_context(context.socket(zmq.SUB))
        sub.connect(f"ipc://{folder}/events")
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.setsockopt(zmq.RCVTIMEO, 100)
        watch.start()
        ends.callback(watch.close)
        expect(watch.watching.wait(30.0), "the node is not watched")

        def keys_in(payload: bytes) -> Iterator[bytes]:
            for event in decode(payload).events:
                if isinstance(event, BlockStored):
                    yield key_of[event.block_hashes[0]]

        def hear() -> Iterator[bytes]:
            try:
                yield from keys_in(sub.recv_multipart()[2])
            except zmq.Again:
                return

        done = threading.Event()

        def steps() -> None:
            while not done.wait(STEP_S):
                if taken := told.take():
                    publisher.publish(KVEventBatch(ts=time.time(), events=list(taken)))

        def note(keys: list[bytes]) -> None:
            hashes = [key + bytes([i]) for key in keys for i in range(BLOCKS)]
            request = SimpleNamespace(
                cache_salt=None, lora_request=None, block_hashes=hashes,
                all_token_ids=list(range(len(hashes) * BLOCK)),
            )  # fmt: skip
            state: Any = SimpleNamespace(request=request, keys=keys)
            told.note(state, 0, len(keys))
            for key in keys:
                key_of[told._chunks[key].hashes[0]] = key

        stepping = threading.Thread(target=steps)
        stepping.start()
        time.sleep(0.5)  # until the publisher knows of the subscriber
        hearing = Hearing(hear)
        stored = storing(node, seconds, rng, note)
        hearing.until(len(stored))
        done.set()
        stepping.join()
        replay = ends.enter_context(context.socket(zmq.DEALER))
        replay.connect(f"ipc://{folder}/replay")
        replay.setsockopt(zmq.RCVTIMEO, 30_000)
        replay.send_multipart([b"", bytes(8)])
        replayed: set[bytes] = set()
        count = 0
        while True:
            _, _, number, payload = replay.recv_multipart()
            if number == ZmqEventPublisher.END_SEQ:
                break
            expect(int.from_bytes(number, "big") == count, "a batch is missing")
            count += 1
            replayed |= set(keys_in(payload))
    expect(stored.keys() <= replayed, f"{len(stored.keys() - replayed)} chunks are in no event")
    expect(stored.keys() <= hearing.heard.keys(), "an event was not heard")
    return row("vLLM's KV events over ZMQ, p99 behind the commit", stored, hearing.heard,
               f"a step every {1e3 * STEP_S:.0f} ms; none lost after replay")  # fmt: skip


def measure(options: Options) -> list[Row]:
    """The rows of this benchmark."""
    rng = np.random.default_rng(options.seed)
    seconds = 2.0 if options.quick else 12.0
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        server = RedisServer(folder / "registry")
        ends.callback(server.close)
        registry = Registry(Client(parse_address(server.url), 4, 2.0), "kvstrata")
        ends.callback(registry.close)
        node = Node(folder, server.url)
        ends.callback(node.close)
        if not registry.members():
            raise KVStrataError("the node is in no fleet")
        rows = [in_registry(node, registry, seconds, rng)]
        if importlib.util.find_spec("vllm") is None:
            say("vLLM is not installed: its events over ZMQ are left out")
            return rows
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        rows.append(over_zmq(node, folder, seconds, rng))
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
