"""Round trips of a match through a node's socket, and what its index costs; prints rows."""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.node.asking import (
    NAMESPACE,
    NUM_KEYS,
    ORDER,
    RAW,
    SEED,
    SLOT,
    TEMPLATE,
    fill_folder,
    random_keys,
    row,
)
from benchmarks.node.holds import RANKS, bench_holds, bench_scan_holds

from kvstrata.config import Config, load_config
from kvstrata.errors import KVStrataError
from kvstrata.header import MARK_BYTES
from kvstrata.node.common.children import MAX_CHILDREN, Children
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

STORED_PER_S = 2000


def store(client: NodeClient, prefix: list[bytes], part: int = 0) -> int:
    reserved: p.Reserved = client.reserve(NAMESPACE, prefix, 0, part, TEMPLATE).wait(30)
    sums = []
    for key, offset in zip(prefix, offsets_of(reserved.offsets), strict=True):
        data = key * (RAW // 32)
        if offset >= 0:
            client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
        sums.append(checksum(data))
    done: p.Done = client.commit(reserved.reservation, sums).wait(30)
    return done.count


def time_matches(
    client: NodeClient, keys: list[bytes], seconds: float, num_parts: int = 1
) -> list[float]:
    """Round trips in ms; every answer is checked."""
    taken: list[float] = []
    parts, lengths = list(range(num_parts)), [RAW] * num_parts
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        matched: p.Matched = client.match(keys, parts, [ORDER], lengths).wait(30)
        taken.append((time.perf_counter() - begun) * 1e3)
        offsets = offsets_of(matched.offsets)
        assert len(matched.tiers) == len(keys), "not all chunks were found"
        assert len(offsets) == len(keys) * num_parts
        sample = random.Random(len(taken)).randrange(len(offsets))
        view = client.pool.view(offsets[sample] + HEADER_BYTES, 32)
        assert view == keys[sample // num_parts], "another chunk's bytes"
        client.release(matched.lease)
        time.sleep(0.001)  # an engine's step, at the least
    return taken


def quantiles(taken: list[float]) -> str:
    cuts = statistics.quantiles(taken, n=100)
    return f"median {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms, n {len(taken)}"


def pressure(config: Config, begin: Event, stop: Event, stored: Any) -> None:
    """Another engine, of 256,000 prompt tokens a second: stores 16 chunks a commit."""
    begin.wait()
    client = connect(config)
    seed = 1000
    due = time.monotonic()
    while not stop.is_set():
        seed += 1
        with contextlib.suppress(KVStrataError):
            stored.value += store(client, random_keys(16, seed))
        due = max(due + 16 / STORED_PER_S, time.monotonic() - 0.1)
        time.sleep(max(0.0, due - time.monotonic()))
    client.close()


def bench_match(seconds: float, num_files: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_RUNTIME_DIR"] = name
        plain = {
            # Ten such prompts: memory that leases and the write queue leave free to be evicted.
            "host.capacity": 10 * NUM_KEYS * SLOT,
            "host.verify_every": 64,
            "secret_file": str(folder / "secret"),
            "linger": "100ms",
            "leases.per_client": "70%",
        }
        ranks = {"host.capacity": 2 * RANKS * NUM_KEYS * SLOT}
        config = load_config(environ={}, overrides={**plain, **ranks})
        keys = random_keys(NUM_KEYS, SEED + 1)
        client = connect(config)
        assert store(client, keys) == NUM_KEYS
        time_matches(client, keys, 0.2)
        taken = time_matches(client, keys, seconds)
        row("match of 782 keys, idle node", quantiles(taken), "median <= 2 ms, p99 <= 5 ms")
        client.clear()
        for part in range(RANKS):
            assert store(client, keys[: NUM_KEYS // 2], part) == NUM_KEYS // 2
            assert store(client, keys, part) == NUM_KEYS - NUM_KEYS // 2
        time_matches(client, keys, 0.2, RANKS)
        taken = time_matches(client, keys, seconds, RANKS)
        row("match of 782 keys of 8 ranks, idle node", quantiles(taken), "median <= 5 ms")
        client.close()

        disk = {
            "disk.path": str(folder / "disk"),
            "disk.capacity": "8GiB",
            "disk.write_queue": NUM_KEYS * SLOT,
        }
        config = load_config(environ={}, overrides={**plain, **disk})
        client = connect(config)  # makes the folder
        client.close()
        time.sleep(0.5)
        fill_folder(folder / "disk", num_files)
        context = multiprocessing.get_context("spawn")
        begin, stop, stored = context.Event(), context.Event(), context.Value("q", 0)
        other = context.Process(target=pressure, args=(config, begin, stop, stored))
        other.start()
        time.sleep(2.0)  # it imports
        begun = time.monotonic()
        client = connect(config)
        assert store(client, keys) == NUM_KEYS
        standing = client.match(keys, [0], [ORDER], [RAW]).wait(30)  # whatever stalls us, they stay
        assert len(standing.tiers) == NUM_KEYS
        begin.set()
        scanning: list[float] = []
        while client.status()["tiers"][0]["state"] == "scanning":
            scanning += time_matches(client, keys, 0.05)
        scanned_s = time.monotonic() - begun
        assert client.status()["tiers"][0]["num_objects"] >= num_files
        while not client.status()["host"]["num_evicted"]:
            time.sleep(0.01)  # the pool is not full yet
        before = client.status()["host"]["num_evicted"]
        busy = time_matches(client, keys, seconds)
        evicted = client.status()["host"]["num_evicted"] - before
        assert evicted, "nothing was evicted meanwhile"
        client.release(standing.lease)
        stop.set()
        other.join()
        if len(scanning) > 10:
            row(f"match of 782 keys, {num_files} files being scanned", quantiles(scanning),
                "median <= 2 ms, p99 <= 5 ms")  # fmt: skip
        row(f"match of 782 keys, eviction running ({evicted / seconds:.0f} chunks/s)",
            quantiles(busy), "median <= 2 ms, p99 <= 5 ms")  # fmt: skip
        row(f"scan of {num_files} files, from the node's start", f"{scanned_s:.2f} s", "<= 2 s")
        client.close()
        time.sleep(0.5)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bench_index(policy: str, count: int) -> None:
    gc.collect()
    before = resident_bytes()
    backing = OwnedBacking(
        MemoryTier(),
        count * SLOT,
        create_policy(policy, count * SLOT),
        queue_bytes=1 << 28,
        num_threads=1,
        deadline_s=1.0,
        counters=Counters(),
        clock=time.monotonic,
    )
    begun = time.perf_counter()
    for start in range(0, count, 10_000):
        for key in random_keys(min(10_000, count - start), start):
            assert backing.index.claim(SLOT)
            backing.index.put(key, 0, SLOT)
    built = time.perf_counter() - begun
    children, marks = Children(), random.Random(SEED)
    for start in range(0, min(count, MAX_CHILDREN), 10_000):
        for key in random_keys(10_000, start):
            children.enter(key, 128, 128, marks.randbytes(8 * MARK_BYTES))
    gc.collect()
    used = resident_bytes() - before
    some = random_keys(1000, (count // 2) // 10_000 * 10_000)
    taken = []
    for _ in range(50):
        # As a match asks, keys that are equal to those in the index but not the same objects.
        fresh = [bytes(bytearray(key)) for key in some]
        begun = time.perf_counter()
        found = sum(backing.find(key, 0, (ORDER,)) is not None for key in fresh)
        taken.append((time.perf_counter() - begun) * 1e3)
        assert found == len(some)
    row(
        f"memory of {count} indexed objects, {len(children)} with marks, {policy}",
        f"{used / 1e6:.0f} MB",
        "<= 600 MB",
    )
    measured = f"median {statistics.median(taken):.2f} ms, worst {max(taken):.2f} ms"
    row(f"lookup of 1,000 keys among them, {policy}", measured, "<= 3 ms")
    row(f"entering them, {policy}", f"{built / count * 1e6:.1f} us each", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller numbers")
    quick = parser.parse_args().quick
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    row("what", "measured", "must reach")
    num_files = 10_000 if quick else 100_000
    bench_match(1.0 if quick else 5.0, num_files)
    bench_holds(3 if quick else 10)
    bench_scan_holds(2 if quick else 5, num_files)
    context = multiprocessing.get_context("spawn")
    for policy in ("lru", "s3fifo", "cost"):
        # In a process of its own: memory that was freed would hide what is taken.
        process = context.Process(target=bench_index, args=(policy, 100_000 if quick else 10**6))
        process.start()
        process.join()
        assert process.exitcode == 0


if __name__ == "__main__":
    main()
