"""Shared stores through KVStrata, beside their own clients: how much of their speed is kept.

The same bytes, as many at once, and a checksum of each, on both sides, in turns.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    BYTES_PER_TOKEN,
    CHUNK_TOKENS,
    Options,
    Row,
    expect,
    main,
    say,
    spread,
)

from kvstrata.config import load_config
from kvstrata.header import ObjectHeader
from kvstrata.node.opening import open_backings
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.shared import SharedBacking
from kvstrata.objects import HEADER_BYTES, checksum, encode, stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.testing.ground import Server

NAME = "stores"
PAYLOAD_BYTES = CHUNK_TOKENS * BYTES_PER_TOKEN
OBJECT_BYTES = stored_bytes(PAYLOAD_BYTES)
NUM_OBJECTS, AT_ONCE, TURNS = 24, 8, 20
BOUND = 0.85
NAMESPACE = bytes(range(32))
ORDER = "benchmark/order"


def an_object(key: bytes, buffer: memoryview) -> None:
    """A whole object of random bytes, as a slot has it."""
    payload = os.urandom(PAYLOAD_BYTES)
    digest = checksum(payload)
    header = ObjectHeader(
        namespace=NAMESPACE, key=key, parent=bytes(32), start=0, num_tokens=CHUNK_TOKENS,
        group=0, rank=0, kind="native", order=ORDER, dtype="uint8", shape=(1, PAYLOAD_BYTES),
        codec="raw", codec_parameters=b"", epoch=0, created_ns=1, raw_length=PAYLOAD_BYTES,
        stored_length=PAYLOAD_BYTES, raw_checksum=digest, stored_checksum=digest,
        chunk_tokens=CHUNK_TOKENS,
    )  # fmt: skip
    buffer[:HEADER_BYTES] = encode(header)
    buffer[HEADER_BYTES : HEADER_BYTES + PAYLOAD_BYTES] = payload


class Buffers:
    """Aligned memory in one piece, as the pool is."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, 2 * NUM_OBJECTS * OBJECT_BYTES))
        places = range(0, len(self.memory), OBJECT_BYTES)
        views = [self.memory[place : place + OBJECT_BYTES] for place in places]
        self.sources, self.targets = views[:NUM_OBJECTS], views[NUM_OBJECTS:]
        for view in self.targets:
            view[:] = bytes(OBJECT_BYTES)  # faulted in


class Raw(ABC):
    """A store's own client."""

    @abstractmethod
    def write(self, name: str, data: memoryview) -> None:
        """Store an object."""

    @abstractmethod
    def read(self, name: str, into: memoryview) -> memoryview:
        """Read one, into ``into`` where the client can; its bytes."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove objects."""

    def bind(self, memory: memoryview) -> None:  # noqa: B027 - most need not know
        """All buffers lie in here."""


class RawRedis(Raw):
    def __init__(self, url: str) -> None:
        import redis

        self._client = redis.Redis.from_url(url, max_connections=AT_ONCE)

    def write(self, name: str, data: memoryview) -> None:
        self._client.set(name, data)

    def read(self, name: str, into: memoryview) -> memoryview:
        return memoryview(self._client.get(name))

    def remove(self, names: Sequence[str]) -> None:
        self._client.unlink(*names)


class RawObjects(Raw):
    def __init__(self, store: Any) -> None:
        self._store = store

    def write(self, name: str, data: memoryview) -> None:
        self._store.put(name, data)

    def read(self, name: str, into: memoryview) -> memoryview:
        return memoryview(self._store.get(name).bytes())

    def remove(self, names: Sequence[str]) -> None:
        self._store.delete(list(names))


class RawMooncake(Raw):
    def __init__(self, master: str) -> None:
        from mooncake.store import MooncakeDistributedStore

        self._store = MooncakeDistributedStore()
        status = self._store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", master)
        expect(status == 0, f"Mooncake's client does not start: {status}")

    def bind(self, memory: memoryview) -> None:
        import numpy as np

        self._start = np.frombuffer(memory, np.uint8).ctypes.data
        self._store.register_buffer(self._start, len(memory))

    def _address(self, view: memoryview) -> int:
        import numpy as np

        return int(np.frombuffer(view, np.uint8).ctypes.data)

    def write(self, name: str, data: memoryview) -> None:
        status = self._store.put_from(name, self._address(data), len(data))
        expect(status == 0, f"put_from: {status}")

    def read(self, name: str, into: memoryview) -> memoryview:
        count = self._store.get_into(name, self._address(into), len(into))
        expect(count == len(into), f"get_into: {count}")
        return into

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._store.remove(name, True)


def redis(folder: Path) -> tuple[Server, dict[str, Any], Callable[[], Raw]]:
    """Redis on loopback."""
    from kvstrata.testing.servers.redis import RedisServer

    server = RedisServer(folder)
    return server, {"redis.url": server.url}, lambda: RawRedis(server.url)


def s3(folder: Path) -> tuple[Server, dict[str, Any], Callable[[], Raw]]:
    """SeaweedFS on loopback."""
    from kvstrata.testing.servers.seaweedfs import BUCKET, KEY, SECRET, SeaweedFS

    server = SeaweedFS(folder)
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    settings = {
        "object_store.url": f"s3://{BUCKET}/kv",
        "object_store.endpoint": server.endpoint,
        "object_store.capacity": "the store's",
    }

    def raw() -> Raw:
        from obstore.store import S3Store

        return RawObjects(
            S3Store(
                BUCKET, prefix="raw", endpoint=server.endpoint, access_key_id=KEY,
                secret_access_key=SECRET, region="us-east-1", client_options={"allow_http": True},
            )
        )  # fmt: skip

    return server, settings, raw


def mooncake(folder: Path) -> tuple[Server, dict[str, Any], Callable[[], Raw]]:
    """Mooncake over TCP on loopback; the memory is another process's."""
    from kvstrata.testing.servers import mooncake as servers

    servers.SEGMENT_BYTES, servers.LEASE = 1 << 30, "10s"
    server = servers.MooncakeServer(folder)
    return server, {"mooncake.master": server.address}, lambda: RawMooncake(server.address)


STORES = {"redis": redis, "object_store": s3, "mooncake": mooncake}


@contextmanager
def started(name: str) -> Iterator[tuple[dict[str, Any], Callable[[], Raw]]]:
    """A store's server for the time of a ``with``."""
    with tempfile.TemporaryDirectory() as folder:
        server, settings, raw = STORES[name](Path(folder) / "server")
        try:
            yield settings, raw
        finally:
            server.close()


class Turns:
    """Both sides of one store, turn by turn; bytes per second."""

    def __init__(self, backing: SharedBacking, raw: Raw, buffers: Buffers) -> None:
        self._backing = backing
        self._raw = raw
        self._buffers = buffers
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self.keys: list[bytes] = []

    def fresh(self) -> None:
        """Other objects than before."""
        number = next(self._numbers)
        self.keys = [checksum(b"%d %d" % (number, i)) * 2 for i in range(NUM_OBJECTS)]
        for key, source in zip(self.keys, self._buffers.sources, strict=True):
            an_object(key, source)

    async def write(self) -> float:
        """Through KVStrata."""
        origin, turn = Origin(self.keys, 0, ORDER, 0.0, "", NAMESPACE), asyncio.Semaphore(AT_ONCE)

        async def one(key: bytes, source: memoryview) -> bool:
            async with turn:
                return await self._backing.write(key, source, origin)

        begun = time.perf_counter()
        pairs = zip(self.keys, self._buffers.sources, strict=True)
        done = await asyncio.gather(*[one(*pair) for pair in pairs])
        took = time.perf_counter() - begun
        expect(all(done), "not everything was written")
        return NUM_OBJECTS * OBJECT_BYTES / took

    async def read(self) -> float:
        """Likewise."""
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(key: bytes, into: memoryview) -> bool:
            async with turn:
                return await self._backing.read(key, 0, OBJECT_BYTES, into) is not None

        begun = time.perf_counter()
        pairs = zip(self.keys, self._buffers.targets, strict=True)
        done = await asyncio.gather(*[one(*pair) for pair in pairs])
        took = time.perf_counter() - begun
        expect(all(done), "not everything was read")
        same = zip(self._buffers.targets, self._buffers.sources, strict=True)
        expect(all(a[HEADER_BYTES:] == b[HEADER_BYTES:] for a, b in same), "other bytes")
        return NUM_OBJECTS * OBJECT_BYTES / took

    async def raw(self, verb: str) -> float:
        """By the store's own client."""

        def write(key: bytes, source: memoryview, into: memoryview) -> bytes:
            self._raw.write(key.hex(), source)
            return checksum(source)

        def read(key: bytes, source: memoryview, into: memoryview) -> bytes:
            return checksum(self._raw.read(key.hex(), into))

        work = {"write": write, "read": read}[verb]

        def run() -> tuple[float, list[bytes]]:
            begun = time.perf_counter()
            buffers = self._buffers.sources, self._buffers.targets
            sums = list(self._threads.map(work, self.keys, *buffers))
            return time.perf_counter() - begun, sums

        took, sums = await asyncio.to_thread(run)
        expect(sums == [checksum(one) for one in self._buffers.sources], "other bytes")
        return NUM_OBJECTS * OBJECT_BYTES / took

    async def remove(self) -> None:
        """Have room for the next ones."""
        await asyncio.to_thread(self._raw.remove, [key.hex() for key in self.keys])
        await self._backing.drop(self.keys)


async def measured(name: str, options: Options) -> list[Row]:
    """The rows of one store."""
    with started(name) as (settings, make_raw):
        overrides = {"host.capacity": "1MiB", f"{name}.codec": "raw", f"{name}.io_threads": AT_ONCE}
        config = load_config(environ={}, overrides={**settings, **overrides})
        buffers, raw = Buffers(), make_raw()
        backings, left_out, _ = open_backings(config, buffers.memory, Counters(), time.monotonic)
        expect(not left_out, f"{left_out}")
        (backing,) = backings
        assert isinstance(backing, SharedBacking)
        raw.bind(buffers.memory)
        running = asyncio.ensure_future(backing.run())
        while not backing.place():
            await asyncio.sleep(0.05)
        turns, speeds = Turns(backing, raw, buffers), dict[tuple[str, str], list[float]]()
        for number in range(4 if options.quick else TURNS):
            turns.fresh()
            for verb in ("write", "read"):
                through = {"write": turns.write, "read": turns.read}[verb]
                sides: list[tuple[str, Callable[[], Any]]] = [
                    ("ours", through), ("raw", partial(turns.raw, verb)),
                ]  # fmt: skip
                for side, run in sides if number % 2 else reversed(sides):
                    speeds.setdefault((verb, side), []).append(await run())
            await turns.remove()
        await backing.stop()
        running.cancel()
        backing.close()
        rows = []
        for verb in ("read", "write"):
            pairs = zip(speeds[verb, "ours"], speeds[verb, "raw"], strict=True)
            ratio = spread(ours / theirs for ours, theirs in pairs)
            ours, theirs = (spread(speeds[verb, side]).median / 1e9 for side in ("ours", "raw"))
            rows.append(
                Row(
                    NAME,
                    f"{name}: {verb} through KVStrata / its own client (speed)",
                    ratio.median,
                    BOUND,
                    at_most=False,
                    detail=f"{ratio}; {ours:.2f} and {theirs:.2f} GB/s",
                )
            )
        say(f"{name}: done")
        return rows


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    return [row for name in STORES for row in asyncio.run(measured(name, options))]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
