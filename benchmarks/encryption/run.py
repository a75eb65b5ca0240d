"""What encryption costs a tier: objects through the disk tier with it and without, in turns.

What is timed is what a node does between host memory and disk: checksums, encryption, direct I/O.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.common import Options, Row, disk_folder, expect, main, say, spread

from kvstrata.header import ObjectHeader
from kvstrata.memory.pool import Pool
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.objects import HEADER_BYTES, checksum, encode, stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.tiers.disk.tier import DiskTier

NAME = "encryption"
PAYLOAD = 3 << 20
SLOT = stored_bytes(PAYLOAD)
NUM_THREADS = 8  # the tier's default

Verb = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True)
class Side:
    """One of the two tiers that are compared."""

    name: str
    backing: OwnedBacking


def open_side(name: str, folder: Path, num_objects: int, keys: KeyRing | None) -> Side:
    """A disk tier in service, as the node has it."""
    capacity = 2 * num_objects * SLOT
    backing = OwnedBacking(
        DiskTier(folder),
        capacity,
        create_policy("lru", capacity, time.monotonic),
        num_threads=NUM_THREADS,
        queue_bytes=capacity,
        deadline_s=60.0,
        counters=Counters(),
        clock=time.monotonic,
        keys=keys,
    )
    return Side(name, backing)


def fill(pool: Pool, num_objects: int, seed: int) -> list[bytes]:
    """Put whole raw objects into the pool's slots; their keys."""
    generator = np.random.default_rng(seed)
    keys = [generator.bytes(32) for _ in range(num_objects)]
    for number, key in enumerate(keys):
        payload = generator.bytes(PAYLOAD)
        digest = checksum(payload)
        header = ObjectHeader(
            namespace=bytes(32), key=key, parent=bytes(32), start=0, num_tokens=128, group=0,
            rank=0, kind="portable", order="", dtype="uint8", shape=(PAYLOAD,), codec="raw",
            codec_parameters=b"", epoch=0, created_ns=0, raw_length=PAYLOAD,
            stored_length=PAYLOAD, raw_checksum=digest, stored_checksum=digest, chunk_tokens=128,
        )  # fmt: skip
        slot = pool.view(number * SLOT, SLOT)
        slot[:HEADER_BYTES] = encode(header)
        slot[HEADER_BYTES:] = payload
    return keys


async def seconds(verb: Verb, num_objects: int) -> float:
    """Time for all objects, as many at once as the tier has threads."""
    numbers = iter(range(num_objects))

    async def work() -> None:
        for number in numbers:
            expect(await verb(number), "an object was not stored, or did not come back")

    started = time.perf_counter()
    await asyncio.gather(*[work() for _ in range(NUM_THREADS)])
    return time.perf_counter() - started


async def rounds(
    sides: Sequence[Side], pool: Pool, keys: Sequence[bytes], count: int
) -> dict[str, list[float]]:
    """Seconds of each round, by side and verb; the first round is a warm-up and left out."""
    views = [pool.view(number * SLOT, SLOT) for number in range(len(keys))]
    sums = [checksum(view[HEADER_BYTES:]) for view in views]
    took: dict[str, list[float]] = {
        f"{side.name} {v}": [] for side in sides for v in ("write", "read")
    }
    for side in sides:
        await side.backing.run()
    for number in range(count + 1):
        order = sides if number % 2 else sides[::-1]
        for side in order:
            backing = side.backing

            async def write(i: int, backing: OwnedBacking = backing) -> bool:
                return await backing.write(keys[i], views[i], Origin([keys[i]], 0, "portable"))

            took[f"{side.name} write"].append(await seconds(write, len(keys)))
        for side in order:
            backing = side.backing

            async def read(i: int, backing: OwnedBacking = backing) -> bool:
                size = backing.find(keys[i], 0, None)
                return size is not None and bool(await backing.read(keys[i], 0, size, views[i]))

            pool.array(0, len(keys) * SLOT)[:] = 0
            took[f"{side.name} read"].append(await seconds(read, len(keys)))
            expect(sums == [checksum(view[HEADER_BYTES:]) for view in views], "other bytes")
        for side in sides:
            await side.backing.clear()
    return {name: values[1:] for name, values in took.items()}


def row_of(verb: str, took: dict[str, list[float]], nbytes: int) -> Row:
    """What encryption makes of a verb's time: pairs of rounds in opposite order make one ratio."""
    plain, sealed = took[f"plain {verb}"], took[f"sealed {verb}"]
    each = [a / b for a, b in zip(sealed, plain, strict=True)]
    ratios = [math.sqrt(a * b) for a, b in zip(each[::2], each[1::2], strict=True)]
    speeds = [nbytes / spread(values).median / 1e9 for values in (sealed, plain)]
    return Row(
        NAME,
        f"{verb} with encryption / without (time)",
        spread(ratios).median,
        None,
        detail=f"{spread(ratios)}; {speeds[0]:.2f} and {speeds[1]:.2f} GB/s",
    )


def in_memory(pool: Pool, keys: KeyRing, count: int) -> list[Row]:
    """How fast one thread encrypts, opens, and for comparison copies."""
    from kvstrata.node.coding.recoding import restored_object, sealed_object
    from kvstrata.node.coding.scratch import Scratch
    from kvstrata.objects import decode

    scratch, slot = Scratch(4), pool.view(0, SLOT)
    name = decode(slot).object_id
    encrypting, opening = [], []
    for _ in range(count):
        started = time.perf_counter()
        sealed = sealed_object(keys, slot, scratch)
        encrypting.append(PAYLOAD / (time.perf_counter() - started) / 1e9)
        started = time.perf_counter()
        restored_object(sealed.data, name, slot, keys, scratch)
        opening.append(PAYLOAD / (time.perf_counter() - started) / 1e9)
        scratch.give(sealed.buffer)
    return [
        Row(NAME, f"{what}, one thread", spread(speeds).median, None, unit="GB/s",
            detail=str(spread(speeds)))
        for what, speeds in (("encrypt", encrypting), ("open, checks included", opening))
    ]  # fmt: skip


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    num_objects, count = (16, 4) if options.quick else (32, 24)
    ring = KeyRing([os.urandom(32)])
    pool = Pool.create(num_objects * SLOT)
    keys = fill(pool, num_objects, options.seed)
    with disk_folder(options) as folder:
        sides = [
            open_side("plain", folder / "plain", num_objects, None),
            open_side("sealed", folder / "sealed", num_objects, ring),
        ]
        try:
            took = asyncio.run(rounds(sides, pool, keys, count))
        finally:
            for side in sides:
                side.backing.close()
    say(f"{num_objects} objects of 3 MiB, {NUM_THREADS} threads, {count} rounds")
    rows = [row_of(verb, took, num_objects * PAYLOAD) for verb in ("write", "read")]
    rows += in_memory(pool, ring, 10 * count)
    pool.close()
    return rows


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
