"""What holds the node's loop, and for how long: everybody else waits meanwhile; prints rows."""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.node.asking import (
    NAMESPACE,
    NUM_KEYS,
    ORDER,
    RAW,
    SLOT,
    TEMPLATE,
    fill_folder,
    random_keys,
    row,
)

from kvstrata.config import load_config
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import COLLECT_EVERY
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

RANKS = 8
MUST = "<= 2 ms"


class Holds:
    """How long each callback of one thread's event loop ran, in CPU time of that thread.

    A machine that is busy with something else takes the loop away from a callback; that is no fault
    of the callback's.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0

    @contextmanager
    def watching(self, thread: threading.Thread) -> Iterator[None]:
        """Watch the plain asyncio loop that runs in this thread."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            if threading.current_thread() is not thread:
                run(handle)
                return
            begun = time.thread_time()
            run(handle)
            self.longest_s = max(self.longest_s, time.thread_time() - begun)

        asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            asyncio.Handle._run = run  # type: ignore[method-assign]


def collect_as_a_node() -> None:
    """Look for garbage as seldom as a node in a process of its own."""
    gc.collect()  # of what this process did before, such a node has nothing
    gc.set_threshold(*COLLECT_EVERY)


def show(what: str, longest: list[float]) -> None:
    """Print the longest holds of the rounds; the worst has what the machine adds now and then, too.

    A virtual machine that loses its processor for a moment is charged for it at times.
    """
    inner, outer = statistics.median(longest) * 1e3, max(longest) * 1e3
    row(f"longest hold: {what}", f"median round {inner:.2f} ms, worst {outer:.2f} ms", MUST)


def store(client: NodeClient, keys: list[bytes], part: int) -> None:
    reserved: p.Reserved = client.reserve(NAMESPACE, keys, 0, part, TEMPLATE).wait(30)
    sums = []
    for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
        data = key * (RAW // 32)
        assert offset >= 0
        client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
        sums.append(checksum(data))
    done: p.Done = client.commit(reserved.reservation, sums).wait(30)
    assert done.count == len(keys)


def load(client: NodeClient, keys: list[bytes], tier: int, parts: list[int]) -> None:
    """Match, wait until all has come, release; everything must be in that tier."""
    matched: p.Matched = client.match(keys, parts, [ORDER], [RAW] * len(parts)).wait(30)
    assert matched.tiers == bytes([tier]) * len(keys)
    arrived: p.Arrived = client.await_arrival(matched.lease, len(keys) - 1).wait(60)
    assert arrived.ready == len(keys)
    client.release(matched.lease)


def aborted(client: NodeClient, keys: list[bytes], parts: list[int]) -> None:
    """Match what has to be promoted, and give it up at once."""
    matched: p.Matched = client.match(keys, parts, [ORDER], [RAW] * len(parts)).wait(30)
    assert len(matched.tiers) == len(keys)
    client.release(matched.lease)


def bench_scan_holds(rounds: int, num_files: int) -> None:
    """The longest hold while what an earlier process left is entered into an index."""
    longest = []
    collect_as_a_node()
    with tempfile.TemporaryDirectory() as name:
        config = load_config(environ={}, overrides={
            "host.capacity": "1MiB",
            "disk.path": str(Path(name) / "disk"),
            "disk.capacity": 2 * num_files * SLOT,
            "secret_file": str(Path(name) / "secret"),
        })  # fmt: skip
        with InProcessNode(config):
            pass  # makes the folder
        fill_folder(Path(name) / "disk", num_files)
        for _ in range(rounds):
            holds = Holds()
            with InProcessNode(config) as node, holds.watching(node._thread):
                client = node.connect()
                while client.status()["tiers"][0]["state"] == "scanning":
                    time.sleep(0.05)
                assert client.status()["tiers"][0]["num_objects"] == num_files
                client.close()
            longest.append(holds.longest_s)
    show(f"scan of {num_files} files", longest)


def bench_holds(rounds: int) -> None:
    """The longest hold of the loop under each kind of long request."""
    keys, parts = random_keys(NUM_KEYS, 7), list(range(RANKS))
    many = random_keys(p.MAX_KEYS, 8)
    collect_as_a_node()
    with tempfile.TemporaryDirectory() as name:
        config = load_config(environ={}, overrides={
            "host.capacity": 4 * RANKS * NUM_KEYS * SLOT,
            "memory.capacity": 2 * RANKS * NUM_KEYS * SLOT,
            "memory.codec": "raw",
            "host.verify_every": 0,
            "secret_file": str(Path(name) / "secret"),
        })  # fmt: skip
        with InProcessNode(config) as node:
            client = node.connect()

            def hold(what: str, work: Callable[[], Any], before: Callable[[], Any] = int) -> None:
                longest = []
                for _ in range(rounds):
                    before()
                    holds = Holds()
                    with holds.watching(node._thread):
                        work()
                    longest.append(holds.longest_s)
                show(what, longest)

            def forget_host() -> None:
                client.flush()
                client.clear(None, ["host"])

            def store_again() -> None:
                client.clear()
                store_ranks()

            def store_ranks() -> None:
                for part in parts:
                    store(client, keys, part)

            chunks = f"{NUM_KEYS} chunks x {RANKS} ranks"
            hold(f"store of {chunks}", store_ranks, client.clear)
            hold(f"first match of {chunks}", lambda: load(client, keys, 0, parts))
            hold(f"match of {chunks}", lambda: load(client, keys, 0, parts))
            hold(f"promotion of {chunks}", lambda: load(client, keys, 1, parts), forget_host)
            hold(f"promotion of {chunks}, given up", lambda: aborted(client, keys, parts),
                 forget_host)  # fmt: skip
            hold(f"lookup of {p.MAX_KEYS} keys", lambda: client.lookup(many, [0]))
            hold(f"clear of {p.MAX_KEYS} keys", lambda: client.clear(many))
            hold(f"clear of {chunks}", lambda: client.clear(keys), store_again)
            hold(f"clear of everything, {chunks}", client.clear, store_again)
            client.close()
