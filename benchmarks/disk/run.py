"""How much of the disk's own speed the disk tier keeps: its reads and writes beside raw O_DIRECT.

Both sides move the same objects out of and into the same pool, with the same number of threads,
in turns, in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvstrata.memory.pool import Pool
from kvstrata.tiers.base import Outcome, Put
from kvstrata.tiers.disk.folder import file_system_of
from kvstrata.tiers.disk.tier import DiskTier

HEADER_BYTES = 4096
# Payloads: 256 KiB; 128 tokens of SmolLM2-135M in bfloat16 (23,040 bytes each); 12 MiB.
PAYLOADS = {"256 KiB": 256 << 10, "2.95 MB": 128 * 23_040, "12 MiB": 12 << 20}
REQUIRED = 0.85

Work = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: what to do with object number i."""

    name: str
    write: Work
    read: Work
    delete: Work


def seconds(work: Work, num_objects: int, num_threads: int) -> float:
    """Time for ``work`` on all objects, dealt out to threads that start together."""
    start = threading.Barrier(num_threads + 1)
    failures: list[BaseException] = []

    def run(first: int) -> None:
        start.wait()
        try:
            for i in range(first, num_objects, num_threads):
                work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if failures:
        raise failures[0]
    return elapsed


def raw_side(folder: Path, ids: list[bytes], views: list[memoryview]) -> Side:
    """A file an object and nothing else: open, one transfer, close."""
    # Spread over folders like the tier's: threads that make files in one folder wait in turn.
    paths = [str(folder / one[:1].hex() / one.hex()) for one in ids]
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        fd = os.open(paths[i], os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        if os.pwrite(fd, views[i], 0) != len(views[i]):
            raise SystemExit("a raw write was short")
        os.close(fd)

    def read(i: int) -> None:
        fd = os.open(paths[i], os.O_RDONLY | os.O_DIRECT)
        if os.preadv(fd, [views[i]], 0) != len(views[i]):
            raise SystemExit("a raw read was short")
        os.close(fd)

    return Side("raw", write, read, lambda i: os.unlink(paths[i]))


def tier_side(tier: DiskTier, ids: list[bytes], views: list[memoryview]) -> Side:
    """As the node uses the tier: one object a call."""

    def expect(outcomes: list[Any], wanted: int | Outcome) -> None:
        if outcomes != [wanted]:
            raise SystemExit(f"the tier answered {outcomes}: {tier.last_error}")

    puts = [Put(i, v[:HEADER_BYTES], v[HEADER_BYTES:]) for i, v in zip(ids, views, strict=True)]
    return Side(
        "tier",
        lambda i: expect(tier.write([puts[i]]), Outcome.HIT),
        lambda i: expect(tier.read([ids[i]], [views[i]]), len(views[i])),
        lambda i: expect(tier.delete([ids[i]]), Outcome.HIT),
    )


def measure(
    folder: Path, payload: int, total: int, rounds: int, num_threads: int, seed: int
) -> dict[str, float]:
    """Medians of bytes/s over rounds on both sides, and of the ratio over pairs of rounds."""
    nbytes = HEADER_BYTES + -(-payload // HEADER_BYTES) * HEADER_BYTES
    num_objects = max(num_threads, total // nbytes)
    pool = Pool.create(nbytes * num_objects)
    tier = DiskTier(folder / "tier")
    (folder / "raw").mkdir()
    try:
        if not tier.direct:
            raise SystemExit(f"{folder} does not allow O_DIRECT: nothing to compare with")
        content = pool.array(0, nbytes * num_objects)
        generator = np.random.default_rng(seed)
        content[:] = generator.integers(0, 256, content.size, np.uint8)
        views = [pool.view(i * nbytes, nbytes) for i in range(num_objects)]
        expected = [xxhash.xxh3_128_digest(view) for view in views]
        ids = [generator.bytes(36) for _ in views]
        sides = [raw_side(folder / "raw" / "objects", ids, views), tier_side(tier, ids, views)]
        speeds: dict[str, list[float]] = {
            f"{verb} {side.name}": [] for verb in ("write", "read") for side in sides
        }
        gc.disable()
        for number in range(rounds + 1):  # the first one is a warm-up
            order = sides if number % 2 else sides[::-1]
            for side in order:
                took = seconds(side.write, num_objects, num_threads)
                speeds[f"write {side.name}"].append(num_objects * nbytes / took)
            for side in order:
                content[:] = 0
                took = seconds(side.read, num_objects, num_threads)
                speeds[f"read {side.name}"].append(num_objects * nbytes / took)
                if [xxhash.xxh3_128_digest(view) for view in views] != expected:
                    raise SystemExit(f"{side.name}: what was read is not what was written")
            for side in order:
                for i in range(num_objects):
                    side.delete(i)
        result = {name: statistics.median(values[1:]) for name, values in speeds.items()}
        for verb in ("write", "read"):
            rows = zip(speeds[f"{verb} tier"][1:], speeds[f"{verb} raw"][1:], strict=True)
            each = [tier_speed / raw_speed for tier_speed, raw_speed in rows]
            # Who comes second writes while the disk is still busy: two rounds of opposite order
            # make one ratio.
            ratios = [math.sqrt(a * b) for a, b in zip(each[::2], each[1::2], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            result |= {f"{verb} ratio": middle, f"{verb} low": low, f"{verb} high": high}
        return result
    finally:
        gc.enable()
        tier.close()
        pool.close()
        shutil.rmtree(folder / "tier")
        shutil.rmtree(folder / "raw")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=128, help="per side and round")
    parser.add_argument("--rounds", type=int, default=12, help="rounded up to an even number")
    parser.add_argument("--threads", type=int, default=4, help="the node's default is 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-tmpfs", action="store_true", help="tmpfs is memory, not a disk")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kind = file_system_of(arguments.folder)
    if kind == "tmpfs" and not arguments.allow_tmpfs:
        raise SystemExit(f"{arguments.folder} is a tmpfs, not a disk; see --folder")
    folder = Path(tempfile.mkdtemp(prefix="kvstrata-bench-", dir=arguments.folder))
    try:
        results = {
            name: measure(
                folder,
                payload,
                arguments.megabytes * 1_000_000,
                arguments.rounds + arguments.rounds % 2,
                arguments.threads,
                arguments.seed,
            )
            for name, payload in PAYLOADS.items()
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ran_on = {
        "file_system": kind,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    if arguments.json:
        json.dump({"ran_on": ran_on, "required": REQUIRED, "results": results}, sys.stdout)
        print()
    else:
        print(", ".join(f"{name} {value}" for name, value in ran_on.items()))
        print("medians; the ratio's quartiles in brackets; required of the ratio:", REQUIRED)
        for name, result in results.items():
            for verb in ("write", "read"):
                print(
                    f"{name:>8} {verb:<5}  raw {result[f'{verb} raw'] / 1e9:5.2f} GB/s"
                    f"  tier {result[f'{verb} tier'] / 1e9:5.2f} GB/s"
                    f"  ratio {result[f'{verb} ratio']:.2f}"
                    f" [{result[f'{verb} low']:.2f}, {result[f'{verb} high']:.2f}]"
                )
    ratios = [result[f"{verb} ratio"] for result in results.values() for verb in ("write", "read")]
    return 0 if min(ratios) >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
