"""Nodes for tests: small pools, objects of one size, and a writer and reader that check bytes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from kvstrata.codecs import codec_named
from kvstrata.config import Config, HostConfig, LeaseConfig
from kvstrata.memory.pool import Pool
from kvstrata.node.coding.choosing import Always
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.node import Node
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.puts import SMALL_BYTES
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.tiers.base import Limits, OwnedTier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

R = TypeVar("R")

RAW = 5000
SLOT = stored_bytes(RAW)
ORDER = "test/order"
OTHER = "test/other"
NAMESPACE = bytes(range(32))


def chunk_keys(count: int, prompt: int = 0) -> list[bytes]:
    """Keys of a prompt's chunks."""
    return [random.Random(f"{prompt} {i}").randbytes(32) for i in range(count)]


def payload(key: bytes, part: int = 0, order: str = ORDER, nbytes: int = RAW) -> bytes:
    """What is stored for a chunk: words whose low byte is noise and whose high byte is not."""
    rng = random.Random(f"{key.hex()} {part} {order}")
    words = bytearray(rng.randbytes(nbytes))
    words[1::2] = bytes(byte & 3 for byte in words[1::2])
    return bytes(words)


def template(order: str = ORDER, nbytes: int = RAW) -> p.Template:
    return p.Template("native", order, "bfloat16", [1, nbytes], 128, nbytes)


def make_backing(
    tier: OwnedTier,
    slots: int = 100,
    *,
    counters: Counters | None = None,
    clock: Callable[[], float] = time.monotonic,
    deadline_s: float = 10.0,
    num_threads: int = 2,
    queue_slots: int = 1000,
    policy: str = "lru",
    codec: str = "raw",
    scrub_bytes_per_s: float = 0.0,
    keys: KeyRing | None = None,
) -> OwnedBacking:
    return OwnedBacking(
        tier,
        slots * SLOT,
        create_policy(policy, slots * SLOT, clock),
        num_threads=num_threads,
        queue_bytes=queue_slots * SLOT,
        deadline_s=deadline_s,
        counters=counters or Counters(),
        clock=clock,
        choice=None if codec == "raw" else Always(codec_named(codec)),
        scrub_bytes_per_s=scrub_bytes_per_s,
        keys=keys,
    )


def make_node(
    slots: int = 10,
    tier: OwnedTier | None = None,
    *,
    tier_slots: int = 100,
    per_client: float = 1,
    total: float = 1,
    verify_every: int = 0,
    policy: str = "lru",
    clock: Callable[[], float] = time.monotonic,
    **backing: Any,
) -> Node:
    """A node with room for so many objects, and with a slower tier if one is given."""
    counters = Counters()
    config = Config(
        host=HostConfig(capacity=slots * SLOT, policy=policy, verify_every=verify_every),
        leases=LeaseConfig(per_client=Fraction(per_client), total=Fraction(total)),
    )
    backings: list[Backing] = []
    if tier is not None:
        backings.append(
            make_backing(tier, tier_slots, counters=counters, clock=clock, policy=policy, **backing)
        )
    return Node(config, Pool.create(slots * SLOT), backings, counters, clock=clock)


def owned(node: Node, number: int = 0) -> OwnedBacking:
    """A slower tier that is the node's alone."""
    backing = node.backings[number]
    assert isinstance(backing, OwnedBacking)
    return backing


def on_node(test: Callable[[Node], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a test on the loop of a node of its own; ends with the conservation laws."""

    async def main() -> None:
        node = make_node(**options)
        await node.start()
        try:
            await asyncio.wait_for(test(node), 30)
            node.check_integrity(contents=True)
        finally:
            await node.stop(drain_s=1.0)

    asyncio.run(main())


def reserve(
    node: Node,
    client: Client,
    prefix: Sequence[bytes],
    first: int = 0,
    part: int = 0,
    order: str = ORDER,
    nbytes: int = RAW,
    cost: float = 0.0,
) -> tuple[int, list[int]]:
    """The reservation's number, and an offset or a refusal for each chunk."""
    request = p.Reserve(1, NAMESPACE, b"".join(prefix), first, part, template(order, nbytes), cost)
    reserved = at_once(node.reserve(client, request))
    return reserved.reservation, list(offsets_of(reserved.offsets))


def write(
    node: Node,
    chunks: Sequence[bytes],
    offsets: Sequence[int],
    part: int = 0,
    order: str = ORDER,
    nbytes: int = RAW,
) -> list[bytes]:
    """Fill reserved slots; the checksums to commit."""
    sums = []
    for key, offset in zip(chunks, offsets, strict=True):
        data = payload(key, part, order, nbytes)
        if offset >= 0:
            node.host.pool.view(offset + HEADER_BYTES, nbytes)[:] = data
        sums.append(checksum(data))
    return sums


def store(
    node: Node,
    client: Client,
    prefix: Sequence[bytes],
    first: int = 0,
    part: int = 0,
    order: str = ORDER,
    nbytes: int = RAW,
) -> int:
    """Reserve, write, commit; the number of objects published."""
    number, offsets = reserve(node, client, prefix, first, part, order, nbytes)
    sums = write(node, prefix[first:], offsets, part, order, nbytes)
    return at_once(node.commit(client, p.Commit(1, number, b"".join(sums)))).count


def match(
    node: Node,
    client: Client,
    keys: Sequence[bytes],
    parts: Sequence[int] = (0,),
    orders: Sequence[str] = (ORDER,),
) -> p.Matched:
    lengths = [RAW] * len(parts)
    return at_once(
        node.match(client, p.Match(1, b"".join(keys), list(parts), list(orders), lengths))
    )


def at_once(answer: R | Awaitable[R]) -> R:
    """What is answered without waiting for anything but its turn."""
    if not isinstance(answer, Awaitable):
        return answer
    going_on = answer.__await__()
    try:
        while True:
            assert next(going_on) is None, "it waits for something"
    except StopIteration as end:
        done: R = end.value
        return done


def release(node: Node, client: Client, lease: int, keep: int = 0) -> None:
    node.release(client, p.Release(lease, keep))


async def arrive(node: Node, client: Client, lease: int, have: int = 0) -> p.Arrived:
    answer = node.await_arrival(client, p.Await(1, lease, have))
    if isinstance(answer, p.Arrived):
        return answer
    arrived = await answer  # type: ignore[misc]
    assert isinstance(arrived, p.Arrived)
    return arrived


async def load(
    node: Node, client: Client, keys: Sequence[bytes], parts: Sequence[int] = (0,)
) -> int:
    """Match, wait until all has come, compare each byte, release; the number of chunks."""
    matched = match(node, client, keys, parts)
    offsets, ready = list(offsets_of(matched.offsets)), 0
    while ready < len(matched.tiers):
        arrived = await arrive(node, client, matched.lease, ready)
        offsets[ready * len(parts) : arrived.ready * len(parts)] = offsets_of(arrived.offsets)
        ready = arrived.ready
        if arrived.failed:
            break
    for i in range(ready * len(parts)):
        key, part = keys[i // len(parts)], parts[i % len(parts)]
        assert stored_payload(node, offsets[i]) == payload(key, part), "other bytes came back"
    release(node, client, matched.lease)
    return ready


def stored_payload(node: Node, offset: int, nbytes: int = RAW) -> bytes:
    return bytes(node.host.pool.view(offset + HEADER_BYTES, nbytes))


async def flush(node: Node, client: Client) -> None:
    await node.flush(client, p.Flush(1))


async def clear(
    node: Node, client: Client, keys: Sequence[bytes] | None = None, tiers: Sequence[str] = ()
) -> int:
    packed = None if keys is None else b"".join(keys)
    done = await node.clear(client, p.Clear(1, packed, list(tiers)))
    assert isinstance(done, p.Done)
    return done.count


async def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let the loop run until something holds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.001)


class GatedTier(MemoryTier):
    """A tier in memory whose verbs wait at a gate while it is shut.

    ``held`` is what it holds in bytes at this moment, ``most`` what it ever held. Each object is
    written by a call of its own.
    """

    limits = Limits(batch_bytes=SMALL_BYTES)

    def __init__(self) -> None:
        super().__init__()
        verbs = ("read", "write", "delete", "clear", "touch", "scan")
        self.gates = {verb: threading.Event() for verb in verbs}
        self.open()
        self.waiting = 0
        self.most = 0
        self.touched: list[bytes] = []

    def shut(self, verb: str) -> None:
        self.gates[verb].clear()

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()

    @property
    def held(self) -> int:
        with self._lock:
            return sum(len(one.data) for one in self._objects.values())

    def read(self, ids: Any, into: Any) -> Any:
        self._pass("read")
        return super().read(ids, into)

    def write(self, puts: Any) -> Any:
        self._pass("write")
        outcomes = super().write(puts)
        self.most = max(self.most, self.held)
        return outcomes

    def delete(self, ids: Any, versions: Any = None) -> Any:
        self._pass("delete")
        return super().delete(ids, versions)

    def clear(self) -> None:
        self._pass("clear")
        super().clear()

    def touch(self, ids: Any) -> None:
        self._pass("touch")
        self.touched += ids

    def scan(self) -> Any:
        self._pass("scan")
        yield from super().scan()

    def _pass(self, verb: str) -> None:
        self.waiting += 1
        assert self.gates[verb].wait(30)
        self.waiting -= 1
