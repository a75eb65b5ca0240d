"""How much of a bare socket's speed a read from a peer keeps, with the same checksum."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import queue
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, expect, main, say, spread
from benchmarks.peers.owner import INDEX, payload, raw_agent

from kvstrata.brought import checksum_of
from kvstrata.config import Config, load_config
from kvstrata.config.network import TRUSTED
from kvstrata.memory.pool import Pool
from kvstrata.node.service.names import Where
from kvstrata.objects import HEADER_BYTES, checksum, stored_bytes, verify_object
from kvstrata.parts import identity
from kvstrata.testing.workplace import wait_ready
from kvstrata.tiers.base import Stat
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer.borrowing import Borrower
from kvstrata.transfer.nixl import Memory
from kvstrata.transfer.peers import NIXL
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

NAME = "peers"
NAMESPACE = bytes(range(32))
ORDER = "benchmark/peers"
NUM_THREADS = 8
"""As many as a node reads from its peers with (`peer.io_threads`)."""
TURN_BYTES = 128_000_000
# Payloads: 128 tokens of SmolLM2-135M in bfloat16 (23,040 bytes each); smaller and larger ones.
SIZES = {"256 KiB": 256 << 10, "2.95 MB": 128 * 23_040, "12 MiB": 12 << 20}
BARE = {"bare": "bare socket", "within": "bare socket with our send buffer"}
"""What our TCP is compared with; the second shows what is owed to that buffer."""
REQUIRED = 0.85
JUDGED = ("2.95 MB", "12 MiB")
"""The smallest object that a real model has, and a usual one; smaller ones for information."""


@dataclass(frozen=True)
class Side:
    """One of those that are compared: fetches object ``i`` into a buffer, and checks it."""

    name: str
    read: Callable[[int, memoryview], None]


@contextlib.contextmanager
def owner(kind: str, seed: int, count: int, nbytes: int) -> Iterator[dict[str, Any]]:
    """A process that has the objects and is no node; where it answers."""
    numbers = map(str, (seed, count, nbytes))
    command = [sys.executable, "-m", "benchmarks.peers.owner", kind, *numbers]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        expect(bool(line), f"the {kind} did not start")
        yield json.loads(line)
    finally:
        process.communicate()


@contextlib.contextmanager
def node(transport: str, seed: int, count: int, nbytes: int, folder: Path) -> Iterator[Config]:
    """A node that has the objects; how another one is configured to read them."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    settings = {
        "node": f"unix:{folder}/node.sock",
        "secret_file": str(folder / "secret"),
        "host.capacity": 2 * count * stored_bytes(nbytes) + (1 << 20),
        "leases.per_client": "80%",
        "network.listen": address,
        "network.transport": transport,
        "network.trusted": TRUSTED,
    }
    config = load_config(environ={}, overrides=settings)
    program = "import json, sys; from kvstrata.config import load_config; "
    program += "from kvstrata.node.process.run import run; "
    program += "run(load_config(environ={}, overrides=json.loads(sys.argv[1])), "
    program += "on_ready=lambda: print('ready', flush=True))"
    command = [sys.executable, "-c", program, json.dumps(config.to_dict())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        expect(bool(process.stdout.readline()), "the node did not start")
        with contextlib.closing(connect(config)) as client:
            wait_ready(client)
            store(client, seed, count, nbytes)
            theirs = {"node", "host.capacity", "leases.per_client", "network.listen"}
            other = {name: value for name, value in settings.items() if name not in theirs}
            yield load_config(environ={}, overrides={**other, "peer.nodes": address})
    finally:
        process.terminate()
        process.communicate()


def store(client: NodeClient, seed: int, count: int, nbytes: int) -> None:
    """Give a node the objects."""
    template = p.Template("native", ORDER, "bfloat16", [1, nbytes], 128, nbytes)
    reserved = client.reserve(NAMESPACE, keys(seed, count), 0, 0, template).wait(60.0)
    sums = []
    for number, offset in enumerate(offsets_of(reserved.offsets)):
        view = client.pool.view(offset + HEADER_BYTES, nbytes)
        view[:] = payload(seed, number, nbytes)
        sums.append(checksum(view))
    taken = client.commit(reserved.reservation, sums).wait(60.0).count
    expect(taken == count, f"the node took {taken} objects of {count}")


def keys(seed: int, count: int) -> list[bytes]:
    """Of the objects, in order."""
    draw = random.Random(seed)
    return [draw.randbytes(32) for _ in range(count)]


def ours(config: Config, pool: Pool, seed: int, count: int) -> Side:
    """The tier that a node reads with, and the check that a node makes."""
    (part,) = config.tiers
    tier = part.open(config)
    assert isinstance(tier, PeerTier)
    if config.network.transport == NIXL:
        tier.read_by(Borrower(Memory(pool.address, pool.capacity_bytes)))
    names = [Where(0, NAMESPACE, ORDER).name(key, 0) for key in keys(seed, count)]
    ids = [identity(key, 0) for key in keys(seed, count)]
    expect(all(isinstance(one, Stat) for one in tier.stat(names)), "the peer lacks objects")

    def read(number: int, into: memoryview) -> None:
        (length,) = tier.read([names[number]], [into])
        expect(length == len(into), f"the peer gave {length} of {len(into)} bytes")
        assert isinstance(length, int)
        verify_object(into, ids[number], checksum_of(length))

    return Side(f"peer over {config.network.transport}", read)


def bare(name: str, port: int, sums: list[bytes], nbytes: int) -> Side:
    """As many sockets as threads, each of one object at a time."""
    free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    for _ in range(NUM_THREADS):
        free.put(socket.create_connection(("127.0.0.1", port)))

    def read(number: int, into: memoryview) -> None:
        connected = free.get()
        connected.sendall(INDEX.pack(number))
        place = 0
        while place < len(into):
            place += connected.recv_into(into[place:])
        free.put(connected)
        same = checksum(into[HEADER_BYTES : HEADER_BYTES + nbytes]) == sums[number]
        expect(same, "the socket gave other bytes")

    return Side(name, read)


def raw_nixl(there: dict[str, Any], pool: Pool, sums: list[bytes], nbytes: int) -> Side:
    """NIXL's own reads, each waited for by the thread that began it."""
    agent = raw_agent("reader")
    agent.register_memory([(pool.address, pool.capacity_bytes, 0, "")], "DRAM")
    name = agent.add_remote_agent(bytes.fromhex(there["metadata"]))

    def read(number: int, into: memoryview) -> None:
        target = pool.address + number * len(into)
        here = agent.get_xfer_descs([(target, len(into), 0)], "DRAM")
        source = agent.get_xfer_descs([(there["addresses"][number], len(into), 0)], "DRAM")
        handle = agent.initialize_xfer("READ", here, source, name)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        same = checksum(into[HEADER_BYTES : HEADER_BYTES + nbytes]) == sums[number]
        expect(state == "DONE" and same, "NIXL gave other bytes")

    return Side("raw NIXL", read)


def seconds(side: Side, views: list[memoryview]) -> float:
    """What all objects take, dealt out to threads that start together."""
    start = threading.Barrier(NUM_THREADS + 1)
    failures: list[BaseException] = []

    def run(first: int) -> None:
        start.wait()
        try:
            for number in range(first, len(views), NUM_THREADS):
                side.read(number, views[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if failures:
        raise failures[0]
    return took


def compare(options: Options, size: str, sides: list[Side], views: list[memoryview]) -> list[Row]:
    """Turn by turn, in changing order, each into memory that was cleared; judged by the second."""
    nbytes = sum(map(len, views))
    speeds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(5 if options.quick else 21):
        for side in sides if number % 2 else sides[::-1]:
            for view in views:
                np.frombuffer(view, np.uint8)[:] = 0
            took = seconds(side, views)
            if number:  # the first turn warms up
                speeds[side.name].append(nbytes / took / 1e9)
    mine, *others = speeds
    rows = []
    for other in others:
        ratio = spread(a / b for a, b in zip(speeds[mine], speeds[other], strict=True))
        medians = [spread(speeds[name]).median for name in (mine, other)]
        say(f"{size}: {mine} {medians[0]:.2f} GB/s, {other} {medians[1]:.2f} GB/s")
        row = Row(
            NAME,
            f"{mine} / {other}, objects of {size} (speed)",
            ratio.median,
            REQUIRED if size in JUDGED and other == others[0] else None,
            at_most=False,
            detail=f"{ratio}; {medians[0]:.2f} of {medians[1]:.2f} GB/s, {NUM_THREADS} at once",
        )
        rows.append(row)
    return rows


def measure(options: Options) -> list[Row]:
    """All rows."""
    os.environ["UCX_NET_DEVICES"] = "lo"
    rows: list[Row] = []
    for transport in ("tcp", NIXL):
        if transport == NIXL and importlib.util.find_spec("nixl_cu12") is None:
            say("NIXL is not installed: no rows of it")
            continue
        for size, nbytes in SIZES.items():
            count = max(NUM_THREADS, TURN_BYTES // nbytes)
            with contextlib.ExitStack() as ends:
                rows += _rows(options, transport, size, count, ends)
    return rows


def _rows(
    options: Options, transport: str, size: str, count: int, ends: contextlib.ExitStack
) -> list[Row]:
    nbytes, seed = SIZES[size], options.seed
    sums = [checksum(payload(seed, i, nbytes)) for i in range(count)]
    folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kvstrata-")))
    config = ends.enter_context(node(transport, seed, count, nbytes, folder))
    room = stored_bytes(nbytes)
    pool = ends.enter_context(contextlib.closing(Pool.create(count * room)))
    pool.populate(in_background=False)
    views = [pool.view(i * room, room) for i in range(count)]
    mine = ours(config, pool, seed, count)
    if transport == NIXL:
        there = ends.enter_context(owner("nixl", seed, count, nbytes))
        others = [raw_nixl(there, pool, sums, nbytes)]
    else:
        others = [
            bare(name, ends.enter_context(owner(kind, seed, count, nbytes))["port"], sums, nbytes)
            for kind, name in BARE.items()
        ]
    gc.disable()
    try:
        return compare(options, size, [mine, *others], views)
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
