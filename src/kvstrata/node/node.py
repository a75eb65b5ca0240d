"""The node's decisions: what a prompt's match is, who gets slots, when an object exists.

`Node` is plain state on one event loop; it knows nothing of sockets. `server.py` puts it behind
one, and tests call it directly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

import kvstrata
from kvstrata.config import Config, host_capacity_bytes
from kvstrata.errors import UsageError
from kvstrata.keys import OWNER_BYTES
from kvstrata.memory.machine import available_bytes
from kvstrata.memory.pool import Pool
from kvstrata.node.common.background import Tasks
from kvstrata.node.opening import open_backings
from kvstrata.node.service.movement import Movement, Wanted
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.scrub import scrub
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.node.slots.sampling import Sampler
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.objects import stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.parts import MAX_PART, PORTABLE
from kvstrata.policies import create_policy
from kvstrata.wire import protocol as p

if TYPE_CHECKING:
    from kvstrata.node.service.backing import Backing

logger = logging.getLogger(__name__)

NUM_RECORDS = 1024
MAX_RECORD_BYTES = 8192
MAX_OUTCOMES = 32
NOTE_USE_S = 10.0

_LABEL = re.compile(r"[a-z0-9_ -]{1,32}")

Answer = p.Reply | None | Awaitable[p.Reply]


class Node:
    """Pool, index and tiers of one machine, as its clients see them.

    All methods run on one event loop and none of them blocks it.

    Args:
        config: capacities, policies, caps and deadlines.
        pool: the shared memory; owned by the node from now on.
        backings: the slower tiers, fastest first; likewise owned.
        counters: shared with the backings.
        left_out: tiers that were configured and could not be opened, and why.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        backings: list[Backing],
        counters: Counters,
        left_out: dict[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.left_out = left_out or {}
        self.counters = counters
        self.backings = backings
        capacity = pool.capacity_bytes
        per_client = int(config.leases.per_client * capacity)
        self.host = HostMemory(pool, create_policy(config.host.policy, capacity, clock))
        self.leases = LeaseTable(self.host, per_client, int(config.leases.total * capacity))
        self.reservations = ReservationTable(self.host, per_client)
        self.movement = Movement(self.host, backings, counters, clock)
        self.records: deque[dict[str, Any]] = deque(maxlen=NUM_RECORDS)
        self._sampler = Sampler(self.host, config.host.verify_every, counters)
        self._outcomes: set[str] = set()
        self._clock = clock
        self._started = clock()
        self._tasks = Tasks(counters)
        self._handlers: dict[type, Callable[[Client, Any], Answer]] = {
            p.Match: self.match,
            p.Await: self.await_arrival,
            p.Release: self.release,
            p.Reserve: self.reserve,
            p.Commit: self.commit,
            p.Lookup: self.lookup,
            p.Clear: self.clear,
            p.Flush: self.flush,
            p.Status: self.status,
            p.Record: self.record,
        }

    @classmethod
    def create(cls, config: Config, clock: Callable[[], float] = time.monotonic) -> Node:
        """A node as configured: allocates the pool and opens the tiers.

        A tier that cannot be opened is left out with a log line; the node serves without it.
        """
        counters = Counters()
        pool = Pool.create(host_capacity_bytes(config, available_bytes()))
        backings, left_out = open_backings(config, counters, clock)
        return cls(config, pool, backings, counters, left_out, clock)

    async def start(self) -> None:
        """Begin the background work: fault the pool in, scan the tiers, scrub them."""
        self.host.pool.populate()
        for backing in self.backings:
            self._tasks.spawn(f"the scan of {backing.name}", self._scan(backing))
            self._tasks.spawn(f"the upkeep of {backing.name}", self._maintain(backing))

    async def stop(self, drain_s: float = 10.0) -> None:
        """Write behind what is queued, for ``drain_s`` at most, and release everything."""
        try:
            await asyncio.wait_for(self.movement.flush(), drain_s)
            for backing in self.backings:
                await asyncio.wait_for(backing.note_use(), drain_s)
        except asyncio.TimeoutError:
            logger.warning("stopped with %d bytes not yet written", self.movement.queued_bytes)
        await self._tasks.cancel()
        await self._sampler.close()
        await self.movement.close(min(2.0, drain_s))
        for backing in self.backings:
            backing.close()
        self.host.close()

    def handle(self, client: Client, message: p.Request) -> Answer:
        """Answer one request: at once, later, or not at all (see the protocol page)."""
        return self._handlers[type(message)](client, message)

    def end(self, client: Client) -> None:
        """Let go of all that a client holds: it is dead, or said that no copy is under way."""
        for number in list(client.leases):
            self.leases.release(self.leases[number])
        for number in list(client.reservations):
            self.reservations.abort(self.reservations[number])

    # reading

    def match(self, client: Client, message: p.Match) -> p.Matched:
        """Lease the leading chunks that exist, and start to promote those in slower tiers."""
        keys, parts = p.split(message.keys, 32), _checked(message.parts)
        if len(message.owner) != OWNER_BYTES:
            raise UsageError(f"an owner of {len(message.owner)} bytes, not {OWNER_BYTES}")
        sizes = _sizes(message.lengths, parts)
        orders = frozenset(message.orders)
        if len(set(keys)) != len(keys):
            raise UsageError("no two chunks of a prompt have one key")
        num_parts, room = len(parts), self.leases.room_for(client)
        # The common case, and the one in a hurry: the head of the prompt lies in host memory.
        held = self.host.leading(keys, parts, orders)
        room -= sum([slot.nbytes for slot in held if not slot.num_leases])
        rest = keys[len(held) // num_parts :]
        if room < 0:
            rest = []
            self.counters.add("matches_cut_total", why="leases")
        while room < 0:
            room += sum([slot.nbytes for slot in held[-num_parts:] if not slot.num_leases])
            del held[-num_parts:]
        self.host.hold_all(held)
        tiers = bytearray(len(held) // num_parts)
        slots: list[Slot | None] = [*held]
        pending: list[tuple[int, Wanted]] = []
        for key in rest:
            located = self._locate(key, parts, orders)
            if located is None:
                break
            for part, (where, _) in zip(parts, located, strict=True):
                if not isinstance(where, Slot):
                    room -= sizes.get(part, where[1])
                elif not where.num_leases:
                    room -= where.nbytes
            if room < 0:
                self.counters.add("matches_cut_total", why="leases")
                break
            for part, (where, _) in zip(parts, located, strict=True):
                if isinstance(where, Slot):
                    where.holds += 1
                    slots.append(where)
                else:
                    backing, stored = where
                    nbytes = sizes.get(part, stored)
                    pending.append((len(slots), Wanted(key, part, nbytes, backing, stored)))
                    slots.append(None)
            tiers.append(max(number for _, number in located))
        num_chunks = len(tiers)
        wanted = [one for _, one in pending]
        compute_s = self.reservations.compute_s(wanted[0].nbytes) / num_parts if wanted else 0.0
        arriving = self.movement.promote(wanted, compute_s, PORTABLE in orders)
        for (position, _), slot in zip(pending, arriving, strict=False):
            slots[position] = slot
        if len(arriving) < len(pending):
            num_chunks = pending[len(arriving)][0] // num_parts
            self.counters.add("matches_cut_total", why="room")
        self.host.unhold_all([s for s in slots[num_chunks * num_parts :] if s is not None])
        held = [slot for slot in slots[: num_chunks * num_parts] if slot is not None]
        del tiers[num_chunks:]
        self._count_match(keys, tiers)
        if not held:
            return p.Matched(message.id, 0, b"", b"")
        lease = self.leases.grant(client, held, num_parts, orders)
        self._sampler.note_hits(keys, parts, held)
        return p.Matched(message.id, lease.id, bytes(tiers), _offsets(held))

    def await_arrival(self, client: Client, message: p.Await) -> Answer:
        """Answer when more chunks of a lease are in host memory, or one will not come.

        Any connection may ask: of one engine a scheduler leases, and its workers load.
        """
        lease, have = self.leases.get(message.lease), message.have
        if lease is None:
            raise UsageError(f"there is no lease {message.lease}")
        if have < 0:
            raise UsageError(f"nobody has {have} chunks")

        def arrived() -> p.Arrived:
            slots = lease.slots[have * lease.num_parts : lease.ready * lease.num_parts]
            return p.Arrived(message.id, lease.ready, lease.failed, _offsets(slots))

        if lease.settled(have):
            return arrived()
        future: asyncio.Future[p.Reply] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not future.done():
                future.set_result(arrived())

        lease.listeners.append((have, tell))
        return future

    def release(self, client: Client, message: p.Release) -> None:
        """End a lease, or all of it but its first chunks."""
        lease = self.leases.get(message.lease)
        if lease is not None:
            if lease.client is not client:
                raise UsageError("a lease is released on the connection that was granted it")
            self.leases.release(lease, message.keep)

    def lookup(self, client: Client, message: p.Lookup) -> p.Found:
        """Say where each chunk is; changes nothing."""
        parts = _checked(message.parts)
        tiers = bytearray()
        for key in p.split(message.keys, 32):
            located = self._locate(key, parts, None)
            tiers.append(p.ABSENT if located is None else max(number for _, number in located))
        return p.Found(message.id, bytes(tiers))

    # writing

    def reserve(self, client: Client, message: p.Reserve) -> p.Reserved:
        """Give out slots for the chunks ``prefix[first:]``, head first, as far as there is room."""
        reservation, offsets = self.reservations.grant(client, message, self._presence)
        return p.Reserved(message.id, reservation.id, offsets.tobytes())

    def commit(self, client: Client, message: p.Commit) -> p.Done:
        """Publish what was written into reserved slots; the rest of them go back."""
        reservation = self.reservations.get(message.reservation)
        if reservation is None:
            return p.Done(message.id, 0)
        if reservation.client is not client:
            raise UsageError("a reservation is committed on the connection that made it")
        checksums = p.split(message.checksums, 16)
        if len(checksums) != len(reservation.slots):
            raise UsageError(f"{len(reservation.slots)} checksums expected, not {len(checksums)}")
        written = self.reservations.finish(reservation, checksums)
        if written:
            last = reservation.prefix.index(written[-1][0])
            origin = Origin(
                reservation.prefix[: last + 1],
                reservation.part,
                reservation.order,
                reservation.cost,
                reservation.weights,
            )
            self.movement.write_behind(origin, written)
        for _, slot in written:
            self.host.unhold(slot)
        self.counters.add("stored_objects_total", len(written))
        return p.Done(message.id, len(written))

    # operating

    def clear(self, client: Client, message: p.Clear) -> Awaitable[p.Reply]:
        """Forget some chunks, or all, in some tiers, or all."""
        names = {"host", *(backing.name for backing in self.backings)}
        if unknown := set(message.tiers) - names:
            raise UsageError(f"no tier {unknown.pop()!r} here; there are {sorted(names)}")
        tiers = set(message.tiers) or names
        wanted = None if message.keys is None else set(p.split(message.keys, 32))
        self.movement.forget(wanted)
        self.reservations.forget(wanted)
        count = 0
        if "host" in tiers:
            for key in list(self.host.index.keys() if wanted is None else wanted):
                count += self.host.drop(key)
        # Out of every index before anybody else is served; only the tiers' own work is awaited.
        backings = [
            backing.clear() if wanted is None else backing.drop(wanted)
            for backing in self.backings
            if backing.name in tiers
        ]

        async def finish() -> p.Reply:
            counts = await asyncio.gather(*backings, return_exceptions=True)
            total = count
            for cleared in counts:
                if isinstance(cleared, BaseException):
                    raise cleared
                total += cleared
            return p.Done(message.id, total)

        return finish()

    def flush(self, client: Client, message: p.Flush) -> Awaitable[p.Reply]:
        """Answer once what was committed so far has been written behind, or given up."""

        async def finish() -> p.Reply:
            await self.movement.flush()
            return p.Done(message.id, 0)

        return finish()

    def record(self, client: Client, message: p.Record) -> None:
        """Keep one request's record for the operator."""
        try:
            nbytes = len(msgspec.msgpack.encode(message.record))
        except RecursionError as error:
            raise UsageError("a record is nested too deep") from error
        if nbytes > MAX_RECORD_BYTES:
            raise UsageError(f"a record of {nbytes} bytes; at most {MAX_RECORD_BYTES}")
        self.records.append(message.record)
        outcome = str(message.record.get("outcome", ""))
        if len(self._outcomes) < MAX_OUTCOMES and _LABEL.fullmatch(outcome):
            self._outcomes.add(outcome)
        label = outcome if outcome in self._outcomes else "other"
        self.counters.add("requests_total", outcome=label)

    def status(self, client: Client, message: p.Status) -> p.State:
        """Everything an operator may ask of a node."""
        host = self.host
        return p.State(
            message.id,
            {
                "release": kvstrata.__version__,
                "pid": os.getpid(),
                "uptime_s": round(self._clock() - self._started, 1),
                "host": {
                    "capacity_bytes": host.pool.capacity_bytes,
                    "allocated_bytes": host.allocated_bytes,
                    "populated_bytes": host.pool.populated_bytes,
                    "num_chunks": len(host.index),
                    "num_objects": host.index.num_objects,
                    "num_evicted": host.num_evicted,
                    "policy": self.config.host.policy,
                },
                "leases": {
                    "count": len(self.leases),
                    "bytes": self.leases.leased_bytes,
                    "reservations": len(self.reservations),
                },
                "tiers": [
                    {
                        "name": backing.name,
                        "codec": backing.choice.name if backing.choice else "raw",
                        "state": backing.state,
                        "capacity_bytes": backing.index.capacity_bytes,
                        "used_bytes": backing.index.used_bytes,
                        "num_chunks": len(backing.index),
                        "num_objects": backing.index.num_objects,
                        "queued_bytes": behind.queued_bytes,
                    }
                    for backing, behind in zip(self.backings, self.movement.behind, strict=True)
                ],
                "tiers_left_out": self.left_out,
                "counters": self.counters.snapshot(),
                "requests": list(self.records)[-32:],
            },
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold: every byte has one owner."""
        self.host.check_integrity([*self.reservations.filling(), *self.movement.filling()])
        self.leases.check_integrity()
        self.reservations.check_integrity()
        for backing in self.backings:
            backing.index.check_integrity()

    # how

    def _locate(
        self, key: bytes, parts: list[int], orders: frozenset[str] | None
    ) -> list[tuple[Slot | tuple[Backing, int], int]] | None:
        """Where each part of a chunk is, with its tier's number; None unless all are somewhere."""
        located: list[tuple[Slot | tuple[Backing, int], int]] = []
        for part in parts:
            slot = self.host.get(key, part)
            if slot is not None:
                if orders is not None and slot.order not in orders:
                    return None
                located.append((slot, 0))
                continue
            for number, backing in enumerate(self.backings, 1):
                nbytes = backing.find(key, part, orders)
                if nbytes is not None:
                    slot = self.movement.arriving.get((key, part))
                    located.append(((backing, nbytes) if slot is None else slot, number))
                    break
            else:
                return None
        return located

    def _presence(self, key: bytes, part: int, order: str) -> int:
        """`PRESENT` if an object need not be written, else 0.

        One in another engine's order is of no use to this writer's kind, and may be replaced.
        Every engine reads the portable order. What a lossy codec keeps is in it, so that no KV
        that was loaded from such a tier is ever encoded a second time.
        """
        orders = (order, PORTABLE)
        slot = self.host.get(key, part)
        if slot is not None:
            return p.PRESENT if slot.order in orders else 0
        if any(backing.find(key, part, orders) is not None for backing in self.backings):
            return p.PRESENT
        return 0

    def _count_match(self, keys: list[bytes], tiers: bytearray) -> None:
        self.counters.add("matches_total")
        for number in range(1 + len(self.backings)):
            name = self.backings[number - 1].name if number else "host"
            if hits := tiers.count(number):
                self.counters.add("hit_chunks_total", hits, tier=name)
        if missed := len(keys) - len(tiers):
            self.counters.add("missed_chunks_total", missed)
        found = keys[: len(tiers)]
        self.host.index.touch(found)
        for backing in self.backings:
            backing.use(found)

    async def _scan(self, backing: Backing) -> None:
        await backing.scan()
        rate = self.config.disk.scrub_rate if self.config.disk else 0
        if rate:
            await scrub(backing, rate)

    async def _maintain(self, backing: Backing) -> None:
        while True:
            await asyncio.sleep(NOTE_USE_S)
            await backing.note_use()


def _checked(parts: list[int]) -> list[int]:
    """Raises `UsageError` unless these can make up a chunk."""
    if not parts or len(set(parts)) != len(parts):
        raise UsageError("name the parts that make up a chunk, each once")
    if not all(0 <= part <= MAX_PART for part in parts):
        raise UsageError(f"not all of {parts} are parts: group << 16 | rank")
    return parts


def _sizes(lengths: list[int], parts: list[int]) -> dict[int, int]:
    """Bytes of each part's object when it is raw, as far as the reader says."""
    if lengths and len(lengths) != len(parts):
        raise UsageError(f"{len(parts)} parts, but the lengths of {len(lengths)}")
    if not all(0 < length < 1 << 48 for length in lengths):
        raise UsageError("a payload has at least one byte, and less than 2^48")
    return dict(zip(parts, map(stored_bytes, lengths), strict=False))


def _offsets(slots: list[Slot]) -> bytes:
    """Offsets of ready slots, `ARRIVING` for the others, as packed 64-bit numbers."""
    return array(
        "q",
        [slot.offset if slot.state is not SlotState.FILLING else p.ARRIVING for slot in slots],
    ).tobytes()
