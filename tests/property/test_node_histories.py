"""Random histories of several clients on one node, against a dictionary of what was committed."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from tests.support.nodes import (
    ORDER,
    OTHER,
    RAW,
    SLOT,
    GatedTier,
    arrive,
    at_once,
    chunk_keys,
    clear,
    flush,
    make_node,
    match,
    payload,
    release,
    reserve,
    stored_payload,
    write,
)

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.faulty import Answer, FaultyTier, FlipBit, Raise
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

PROMPTS = [chunk_keys(4, prompt) for prompt in range(3)]
ALL = [key for prompt in PROMPTS for key in prompt]
HOST_SLOTS, TIER_SLOTS = 9, 12
ORDERS = [ORDER, OTHER]

prompts = st.sampled_from(PROMPTS)
clients = st.integers(0, 2)
parts_ = st.sampled_from([[0], [1], [0, 1]])


@dataclass
class Reserved:
    client: Client
    number: int
    prefix: list[bytes]
    first: int
    part: int
    order: str
    version: str
    offsets: list[int]
    cleared: set[bytes]


@dataclass
class Leased:
    client: Client
    number: int
    keys: list[bytes]
    parts: list[int]
    orders: list[str]
    # what each object may be: all that was committed before the match and not cleared then
    valid: dict[tuple[bytes, int], set[bytes]]
    ready: int
    # what lay in each ready slot when it was first seen
    seen: dict[int, bytes]


class Histories(RuleBasedStateMachine):
    # What was not granted enters its bundle as None: whether it is depends on how fast threads
    # are, and what hypothesis may draw next must not.
    reservations = Bundle("reservations")
    leases = Bundle("leases")

    @initialize(
        policy=st.sampled_from(["lru", "s3fifo", "cost"]),
        codec=st.sampled_from(["raw", "lossless"]),
    )
    def begin(self, policy: str, codec: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.inner = GatedTier()
        self.tier = FaultyTier(self.inner)
        # object -> the payloads that were committed since it was last cleared
        self.model: dict[tuple[bytes, int], set[bytes]] = {}
        self.versions = 0
        self.open_reservations: list[Reserved] = []
        self.open_leases: list[Leased] = []
        self.clients = [Client(f"pid {number}") for number in range(3)]

        async def make() -> Any:
            node = make_node(
                HOST_SLOTS,
                self.tier,
                tier_slots=TIER_SLOTS,
                queue_slots=4,
                per_client=0.75,
                total=0.8,
                verify_every=3,
                policy=policy,
                codec=codec,
                clock=self.clock,
                deadline_s=5.0,
            )
            await node.start()
            return node

        self.node = self.run(make())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    @rule(
        target=reservations,
        client=clients,
        prompt=prompts,
        first=st.integers(0, 3),
        length=st.integers(1, 4),
        part=st.integers(0, 1),
        order=st.sampled_from(ORDERS),
    )
    def begin_to_store(
        self, client: int, prompt: list[bytes], first: int, length: int, part: int, order: str
    ) -> Reserved | None:
        return self.reserve(client, prompt, first, length, part, order)

    def reserve(
        self, client: int, prompt: list[bytes], first: int, length: int, part: int, order: str
    ) -> Reserved | None:
        me, prefix = self.clients[client], prompt[: first + length]
        number, offsets = reserve(self.node, me, prefix, first, part, order)
        if max(offsets) < 0:
            return None
        self.versions += 1
        taken = Reserved(
            me, number, prefix, first, part, order, f"{order} {self.versions}", offsets, set()
        )
        # Two who write one object at once would be a lost update.
        for other in self.open_reservations:
            if other.part == part:
                ours = {k for k, o in zip(prefix[first:], offsets, strict=True) if o >= 0}
                chunks = zip(other.prefix[other.first :], other.offsets, strict=True)
                assert not ours & {key for key, offset in chunks if offset >= 0}
        self.open_reservations.append(taken)
        return taken

    @rule(taken=consumes(reservations), written=st.lists(st.booleans(), min_size=4, max_size=4))
    def end_storing(self, taken: Reserved | None, written: list[bool]) -> None:
        if taken is not None and taken in self.open_reservations:  # its client has not died
            self.commit(taken, written)

    def commit(self, taken: Reserved, written: list[bool]) -> None:
        self.open_reservations.remove(taken)
        chunks = taken.prefix[taken.first :]
        sums = write(self.node, chunks, taken.offsets, taken.part, taken.version)
        count = 0
        for i, (key, offset) in enumerate(zip(chunks, taken.offsets, strict=True)):
            if not written[i]:
                sums[i] = bytes(16)
            elif offset >= 0 and key not in taken.cleared:
                count += 1
                data = payload(key, taken.part, taken.version)
                self.model.setdefault((key, taken.part), set()).add(data)

        async def commit() -> p.Done:
            request = p.Commit(1, taken.number, b"".join(sums))
            done: p.Done = at_once(self.node.commit(taken.client, request))
            assert at_once(self.node.commit(taken.client, request)).count == 0
            return done

        assert self.run(commit()).count == count

    @rule(client=clients, prompt=prompts, part=st.integers(0, 1), order=st.sampled_from(ORDERS))
    def store(self, client: int, prompt: list[bytes], part: int, order: str) -> None:
        """All of a prompt, reserved and committed at once."""
        taken = self.reserve(client, prompt, 0, 4, part, order)
        if taken is not None:
            self.commit(taken, [True] * 4)

    @rule(
        target=leases,
        client=clients,
        prompt=prompts,
        parts=parts_,
        orders=st.sampled_from([[ORDER], [OTHER], ORDERS]),
    )
    def match(
        self, client: int, prompt: list[bytes], parts: list[int], orders: list[str]
    ) -> Leased | None:
        async def ask() -> p.Matched:
            return match(self.node, self.clients[client], prompt, parts, orders)

        matched = self.run(ask())
        assert (matched.lease == 0) == (not matched.tiers)
        if not matched.lease:
            return None
        keys = prompt[: len(matched.tiers)]
        objects = [(key, part) for key in keys for part in parts]
        valid = {name: set(self.model.get(name, ())) for name in objects}
        lease = Leased(self.clients[client], matched.lease, keys, parts, orders, valid, 0, {})
        self.open_leases.append(lease)
        for (key, part), offset in zip(objects, offsets_of(matched.offsets), strict=True):
            assert self.model.get((key, part)), "a hit on what was never stored, or cleared"
            if offset >= 0:
                self.see(lease, key, part, offset)
        return lease

    def see(self, lease: Leased, key: bytes, part: int, offset: int) -> None:
        """What is leased is what was there at the match, also if it has been cleared since."""
        data = stored_payload(self.node, offset)
        header = decode(self.node.host.pool.view(offset, HEADER_BYTES))
        assert (header.key, header.rank) == (key, part)
        assert header.order in lease.orders
        assert data in lease.valid[key, part], "other bytes came back"
        lease.seen[offset] = data

    @rule(lease=leases)
    def load(self, lease: Leased | None) -> None:
        """Wait until all has come, or will not come."""
        if lease is None or lease not in self.open_leases:
            return

        async def load() -> None:
            while lease.ready < len(lease.keys):
                arrived = await arrive(self.node, lease.client, lease.number, lease.ready)
                chunks = lease.keys[lease.ready : arrived.ready]
                objects = [(key, part) for key in chunks for part in lease.parts]
                for (key, part), offset in zip(objects, offsets_of(arrived.offsets), strict=True):
                    self.see(lease, key, part, offset)
                lease.ready = arrived.ready
                if arrived.failed:
                    break

        self.run(load())

    @rule(lease=leases, keep=st.integers(0, 3))
    def release(self, lease: Leased | None, keep: int) -> None:
        if lease is None or lease not in self.open_leases:
            return
        release(self.node, lease.client, lease.number, keep)
        lease.keys = lease.keys[:keep]
        lease.ready = min(lease.ready, keep)
        lease.seen.clear()  # not known which offset belongs to which chunk
        if not keep:
            self.open_leases.remove(lease)

    @rule(client=clients)
    def die(self, client: int) -> None:
        dead = self.clients[client]
        self.node.end(dead)
        assert not dead.holds_something
        self.open_leases = [lease for lease in self.open_leases if lease.client is not dead]
        self.open_reservations = [r for r in self.open_reservations if r.client is not dead]
        self.clients[client] = Client("pid 9")

    @rule(chosen=st.none() | st.lists(st.sampled_from(ALL), max_size=5))
    def clear(self, chosen: list[bytes] | None) -> None:
        gone = set(ALL if chosen is None else chosen)
        for taken in self.open_reservations:
            taken.cleared |= gone
        for key in gone:
            self.model.pop((key, 0), None)
            self.model.pop((key, 1), None)
        with contextlib.suppress(TierUnavailable):
            self.run(clear(self.node, self.clients[0], chosen))

    @rule()
    def forget_host(self) -> None:
        """So that the slower tier is asked."""
        self.run(flush(self.node, self.clients[0]))
        for taken in self.open_reservations:
            taken.cleared |= set(ALL)
        self.run(clear(self.node, self.clients[0], None, ["host"]))

    @rule()
    def flush(self) -> None:
        self.run(flush(self.node, self.clients[0]))

    @rule(
        fault=st.sampled_from(
            [
                ("write", FlipBit(8 * 5000)),
                ("read", FlipBit(8 * 5000)),
                ("read", Answer(Outcome.FAILED)),
                ("read", Raise(TierUnavailable("gone"))),
                ("read", Raise(ValueError("a bug"))),
                ("write", Answer(Outcome.FAILED)),
                ("write", Raise(TierFull("no space"))),
                ("delete", Answer(Outcome.FAILED)),
                ("delete", Raise(TierUnavailable("gone"))),
                ("clear", Raise(TierUnavailable("gone"))),
            ]
        )
    )
    def hurt(self, fault: tuple[Any, Any]) -> None:
        self.tier.inject(*fault, times=1)

    @rule()
    def heal(self) -> None:
        self.tier.heal()
        self.clock.advance(100.0)

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "node"):
            return
        self.node.check_integrity()
        assert self.node.host.allocated_bytes <= HOST_SLOTS * SLOT
        assert self.inner.most <= TIER_SLOTS * SLOT
        for lease in self.open_leases:
            for offset, data in lease.seen.items():
                assert stored_payload(self.node, offset, RAW) == data, "leased bytes have moved"

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        self.tier.heal()
        for client in self.clients:
            self.node.end(client)
        self.run(flush(self.node, self.clients[0]))
        self.node.check_integrity()
        assert not list(self.node.reservations.filling())
        self.run(self.node.stop(drain_s=1.0))
        self.loop.close()


Histories.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestHistories(Histories.TestCase):  # type: ignore[misc, valid-type]
    pass
