"""Histories after which a match does not find a chunk: every cause in every tier, on real nodes.

Each history is made again with other numbers by a seed: how long the prompt is, where its first
missing chunk is, and what others do at the same node before and in between.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.asking import Asker, Prompt, a_node, prompt
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.nodes import ORDER, OTHER, SLOT, clear, flush, owned, reserve, store, until

from kvstrata.errors import TierUnavailable
from kvstrata.objects import HEADER_BYTES
from kvstrata.observe.reasons import Why
from kvstrata.parts import identity
from kvstrata.tiers.base import OwnedTier
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.faulty import FaultyTier, FlipBit
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

Found = list[tuple[str, int, str, str]]


class History:
    """One history: its numbers, the folder of its disk, and what it ends with."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.length = self.rng.randint(2, 5)
        self.at = self.rng.randrange(self.length)  # the first missing chunk
        self.prompt = prompt(self.rng, self.length)

    def tier(self, name: str) -> OwnedTier:
        return MemoryTier() if name == "memory" else DiskTier(self.folder)

    async def others(self, asker: Asker) -> None:
        """What somebody else does meanwhile, that is none of this prompt's business."""
        for _ in range(self.rng.randint(0, 2)):
            other = prompt(self.rng, 1)
            await asker.keep(other)
            if self.rng.random() < 0.5:
                await clear(asker.node, asker.client, other.keys)

    def expect(self, why: Why, tier: str = "", detail: str = "") -> Found:
        """All chunks from the first missing one on."""
        return [(why.value, self.length - self.at, tier, detail)]


class Case(NamedTuple):
    """A history and the causes that it is about."""

    name: str
    play: Callable[[History], Awaitable[tuple[Found, Found]]]
    causes: tuple[Why, ...]


async def never_stored(h: History) -> tuple[Found, Found]:
    async with a_node((h.tier("disk"), 40)) as asker:
        await h.others(asker)
        store(asker.node, asker.client, h.prompt.keys[: h.at]) if h.at else None
        return await asker.why(h.prompt), h.expect(Why.NEVER)


def evicted(tier: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        tiers = [] if tier == "host" else [(h.tier(tier), 6)]
        async with a_node(*tiers, slots=6) as asker:
            await asker.keep(h.prompt)
            await h.others(asker)
            place = asker.node.host.index if tier == "host" else owned(asker.node).index
            while h.prompt.keys[h.at] in place:
                await asker.keep(prompt(h.rng, 1))
            # The tail goes first; whether more of it has gone by now does not matter.
            return await asker.why(h.prompt), h.expect(Why.EVICTED, tier)

    return play


def cleared(tier: str, whole: bool) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        tiers = [] if tier == "host" else [(h.tier(tier), 40)]
        async with a_node(*tiers) as asker:
            await asker.keep(h.prompt)
            await h.others(asker)
            gone = None if whole else h.prompt.keys[h.at :]
            if tier != "host":
                await clear(asker.node, asker.client, h.prompt.keys, ["host"])
            await clear(asker.node, asker.client, gone, [tier])
            h.at = 0 if whole else h.at
            return await asker.why(h.prompt), h.expect(Why.CLEARED, tier)

    return play


async def corrupt_in_host(h: History) -> tuple[Found, Found]:
    async with a_node(verify_every=1) as asker:
        await asker.keep(h.prompt)
        await h.others(asker)
        slot = asker.node.host.get(h.prompt.keys[h.at], 0)
        assert slot is not None
        asker.node.host.pool.view(slot.offset + HEADER_BYTES + 5, 1)[:] = b"\xff"
        await asker.match(h.prompt)
        await until(lambda: h.prompt.keys[h.at] not in asker.node.host.index)
        return await asker.why(h.prompt), h.expect(Why.CORRUPT, "host")


def corrupt(name: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        tier = FaultyTier(h.tier(name))
        async with a_node((tier, 40)) as asker:
            if h.at:
                await asker.keep(Prompt(h.prompt.tokens[: 128 * h.at]))
            tier.inject("write", FlipBit(bit=8 * 6000))
            await asker.keep(h.prompt, h.at)
            await clear(asker.node, asker.client, tiers=["host"])
            assert not await asker.why(h.prompt), "it is thought to be there"
            await until(lambda: h.prompt.keys[h.at] not in owned(asker.node).index)
            return await asker.why(h.prompt), h.expect(Why.CORRUPT, name)

    return play


def lost(name: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        tier = h.tier(name)
        async with a_node((tier, 40)) as asker:
            await asker.keep(h.prompt)
            await h.others(asker)
            await clear(asker.node, asker.client, tiers=["host"])
            tier.delete([identity(key, 0) for key in h.prompt.keys[h.at :]])
            await asker.why(h.prompt)
            await until(lambda: h.prompt.keys[h.at] not in owned(asker.node).index)
            return await asker.why(h.prompt), h.expect(Why.LOST, name)

    return play


async def arriving(h: History) -> tuple[Found, Found]:
    async with a_node() as asker:
        await h.others(asker)
        if h.at:
            await asker.keep(Prompt(h.prompt.tokens[: 128 * h.at]))
        number, offsets = reserve(asker.node, asker.client, h.prompt.keys, h.at)
        found = await asker.why(h.prompt)
        written = b"".join(bytes(16) for _ in offsets)
        asker.node.commit(asker.client, p.Commit(1, number, written))
        return found, h.expect(Why.ARRIVING)


def another_order(name: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        async with a_node((h.tier("disk"), 40)) as asker:
            if h.at:
                await asker.keep(Prompt(h.prompt.tokens[: 128 * h.at]))
            store(asker.node, asker.client, h.prompt.keys, h.at, order=OTHER)
            await flush(asker.node, asker.client)
            if name == "disk":
                await clear(asker.node, asker.client, tiers=["host"])
            return await asker.why(h.prompt), h.expect(Why.ORDER, name)

    return play


def tier_off(name: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        async with a_node((h.tier(name), 40)) as asker:
            await asker.keep(h.prompt)
            await h.others(asker)
            await clear(asker.node, asker.client, h.prompt.keys[h.at :], ["host"])
            owned(asker.node).trip(TierUnavailable("the cable is out"))
            expected = h.expect(Why.TIER_OFF, name, "off: the cable is out")
            return await asker.why(h.prompt), expected

    return play


def capped(by: str) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    async def play(h: History) -> tuple[Found, Found]:
        room = max(1, h.at)
        h.at = room if room < h.length else h.length - 1
        if by == "leases":
            async with a_node(slots=20, per_client=h.at / 20) as asker:
                for start in range(h.length):
                    store(asker.node, asker.client, h.prompt.keys[: start + 1], start)
                return await asker.why(h.prompt), h.expect(Why.CAPPED, detail="leases")
        async with a_node((h.tier("disk"), 40), slots=h.length) as asker:
            await asker.keep(h.prompt)
            await clear(asker.node, asker.client, h.prompt.keys[h.at :], ["host"])
            number, _ = reserve(asker.node, asker.client, prompt(h.rng, h.length - h.at).keys)
            found = await asker.why(h.prompt)
            asker.node.commit(asker.client, p.Commit(1, number, bytes(16 * (h.length - h.at))))
            return found, h.expect(Why.CAPPED, detail="room")

    return play


async def planned(h: History) -> tuple[Found, Found]:
    async with a_node((h.tier("memory"), 40)) as asker:
        await asker.keep(h.prompt)
        await clear(asker.node, asker.client, h.prompt.keys[h.at :], ["host"])
        bandwidth = owned(asker.node).bandwidth
        bandwidth._bytes, bandwidth._seconds = 10 * SLOT, 1.0
        bandwidth.looked()
        return await asker.why(h.prompt, chunk_s=0.01), h.expect(Why.PLANNED)


@asynccontextmanager
async def of_fleet(fleet: Fleet, **options: Any) -> Any:
    node = make_member(FleetTier(fleet), **options)
    await node.start()
    try:
        await until(lambda: node.backings[0].readable)
        yield Asker(node)
    finally:
        fleet.open()
        await node.stop(drain_s=1.0)


async def store_off(h: History) -> tuple[Found, Found]:
    fleet = Fleet()
    async with of_fleet(fleet) as asker:
        await asker.keep(h.prompt)
        if h.rng.random() < 0.5:  # evicted from host memory: the store would have it
            while h.prompt.keys[h.at] in asker.node.host.index:
                await asker.keep(prompt(h.rng, 5))
        else:
            h.prompt, h.at = prompt(h.rng, h.length), 0
        asker.node.backings[0].trip(TierUnavailable("no route"))
        return await asker.why(h.prompt), h.expect(Why.TIER_OFF, "fleet", "off: no route")


async def moved(h: History) -> tuple[Found, Found]:
    """Into a store that lost it since."""
    fleet = Fleet()
    async with of_fleet(fleet) as asker:
        await asker.keep(h.prompt)
        keys, namespace = b"".join(h.prompt.keys[h.at :]), h.prompt.namespace.digest()
        await asker.handle(o.Move(1, keys, "host", "fleet", [0], [ORDER], namespace))
        await until(lambda: h.prompt.keys[-1] not in asker.node.host.index)
        fleet.objects.delete(fleet.names)
        while not await asker.why(h.prompt):
            pass  # what was heard of the store is thought to be there until a load fails
        return await asker.why(h.prompt), h.expect(Why.MOVED, "host")


async def drained(h: History) -> tuple[Found, Found]:
    async with a_node() as asker:
        await asker.keep(h.prompt)
        drainer = asker.node.operations.drainer
        drainer.end = lambda: None  # it goes on to be asked until it ends
        await asker.handle(o.Drain(1, True))
        await until(lambda: drainer.closing)
        h.at = 0
        return await asker.why(h.prompt), h.expect(Why.NO_NODE, detail="it is being drained")


async def store_late(h: History) -> tuple[Found, Found]:
    fleet = Fleet()
    async with of_fleet(fleet, lookup_timeout_s=0.01) as asker:
        if h.at:
            await asker.keep(Prompt(h.prompt.tokens[: 128 * h.at]))
        fleet.shut("stat")
        return await asker.why(h.prompt), h.expect(Why.DEADLINE, "fleet", "lookup")


def elsewhere(parts: str, **change: Any) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    """The same tokens under another namespace, of the same owner."""

    async def play(h: History) -> tuple[Found, Found]:
        async with a_node((h.tier("disk"), 40)) as asker:
            other = h.prompt.under(**change)
            asker.tell(h.prompt, other)
            await h.others(asker)
            await asker.keep(other)
            if h.rng.random() < 0.5:
                await clear(asker.node, asker.client, tiers=["host"])
            found = await asker.why(h.prompt)
            h.at = 0
            return found, h.expect(Why.NAMESPACE, detail=parts)

    return play


def of_another(part: str, **change: Any) -> Callable[[History], Awaitable[tuple[Found, Found]]]:
    """Of somebody else: a match hears nothing of it, and an operator who asks for it does."""

    async def play(h: History) -> tuple[Found, Found]:
        async with a_node() as asker:
            other = h.prompt.under(**change)
            asker.tell(h.prompt, other)
            await asker.keep(other)
            h.at = 0
            assert await asker.why(h.prompt) == h.expect(Why.NEVER)
            told = []
            for across in (False, True):
                explained = await asker.handle(p.Explain(
                    1, "", b"".join(h.prompt.keys), h.prompt.namespace.digest(), h.prompt.owner,
                    h.prompt.heads, across,
                ))  # fmt: skip
                assert isinstance(explained, p.Explained)
                told.append([(r.why.value, r.chunks, r.tier, r.detail) for r in explained.reasons])
            assert told[0] == h.expect(Why.NEVER)
            return told[1], h.expect(Why.NAMESPACE, detail=part)

    return play


DETAILS = ("weights", "configuration", "dtype", "quantization", "kv_cache_dtype", "max_model_len",
           "reset")  # fmt: skip
PARTS: dict[str, Any] = {
    "layout": "full/30x3x64x2/float16",
    "chunk_tokens": 64,
    "tensor_parallel": 2,
    "slices": 2,
    "selection": "a-method",
    "pipeline_parallel": 2,
    "context_parallel": 2,
    "adapter": "lora-1",
}
CASES = [
    Case("never stored", never_stored, (Why.NEVER,)),
    *(Case(f"evicted from {t}", evicted(t), (Why.EVICTED,)) for t in ("host", "memory", "disk")),
    *(
        Case(f"{'all' if whole else 'chunks'} cleared from {t}", cleared(t, whole), (Why.CLEARED,))
        for t in ("host", "memory", "disk")
        for whole in (True, False)
    ),
    Case("corrupt in host", corrupt_in_host, (Why.CORRUPT,)),
    *(Case(f"corrupt in {t}", corrupt(t), (Why.CORRUPT,)) for t in ("memory", "disk")),
    *(Case(f"lost by {t}", lost(t), (Why.LOST,)) for t in ("memory", "disk")),
    Case("arriving", arriving, (Why.ARRIVING,)),
    *(Case(f"another order in {t}", another_order(t), (Why.ORDER,)) for t in ("host", "disk")),
    *(Case(f"{t} off", tier_off(t), (Why.TIER_OFF,)) for t in ("memory", "disk")),
    Case("store off", store_off, (Why.TIER_OFF,)),
    Case("moved", moved, (Why.MOVED,)),
    Case("drained", drained, (Why.NO_NODE,)),
    Case("store late", store_late, (Why.DEADLINE,)),
    *(Case(f"capped by {cap}", capped(cap), (Why.CAPPED,)) for cap in ("leases", "room")),
    Case("left to the engine", planned, (Why.PLANNED,)),
    *(
        Case(f"other {name}", elsewhere(name, model="m2", details={name: "2"}), (Why.NAMESPACE,))
        for name in DETAILS
    ),
    *(
        Case(f"other {name}", elsewhere(name, **{name: value}), (Why.NAMESPACE,))
        for name, value in PARTS.items()
    ),
    Case(
        "two parts differ",
        elsewhere("weights, adapter", model="m2", details={"weights": "2"}, adapter="a"),
        (Why.NAMESPACE,),
    ),
    Case("another's tenant", of_another("tenant", tenant="b"), (Why.NAMESPACE, Why.NEVER)),
    Case("another's salt", of_another("salt", salt="s"), (Why.NAMESPACE, Why.NEVER)),
]
