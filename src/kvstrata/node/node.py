"""The node's decisions: what a prompt's match is, who gets slots, when an object exists.

`Node` is plain state on one event loop; it knows nothing of sockets. `server.py` puts it behind
one, and tests call it directly.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import kvstrata
from kvstrata.config import Config, host_capacity_bytes
from kvstrata.errors import ConfigError, CorruptObject, Incompatible, TierUnavailable, UsageError
from kvstrata.memory import Pool, available_bytes
from kvstrata.node import protocol as p
from kvstrata.node.backing import Backing, identity
from kvstrata.node.host import HostMemory, Slot, SlotState, order_name
from kvstrata.node.leases import Client, LeaseTable, Reservation
from kvstrata.node.movement import Movement
from kvstrata.node.scrub import scrub
from kvstrata.objects import HEADER_BYTES, ObjectHeader, stored_bytes, verify_object
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy

logger = logging.getLogger(__name__)

NO_PARENT = bytes(32)
NOT_WRITTEN = bytes(16)
NUM_RECORDS = 1024
NOTE_USE_S = 10.0

Answer = p.Reply | None | Awaitable[p.Reply]


class Node:
    """Pool, index and tiers of one machine, as its clients see them.

    All methods run on one event loop and none of them blocks it.

    Args:
        config: capacities, policies, caps and deadlines.
        pool: the shared memory; owned by the node from now on.
        backings: the slower tiers, fastest first; likewise owned.
        counters: shared with the backings.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        backings: list[Backing],
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.counters = counters
        self.backings = backings
        capacity = pool.capacity_bytes
        self.host = HostMemory(pool, create_policy(config.host.policy, capacity, clock))
        self.leases = LeaseTable(
            self.host,
            int(config.leases.per_client * capacity),
            int(config.leases.total * capacity),
        )
        self.movement = Movement(
            self.host,
            backings,
            config.disk.write_queue if config.disk else 0,
            counters,
            clock,
        )
        self.records: deque[dict[str, Any]] = deque(maxlen=NUM_RECORDS)
        self._clock = clock
        self._started = clock()
        self._writing: dict[tuple[bytes, int], Reservation] = {}
        self._reservations: dict[int, Reservation] = {}
        self._numbers = itertools.count(1)
        self._until_verify = config.host.verify_every
        self._background: list[asyncio.Task[None]] = []
        self._verifying: set[asyncio.Task[None]] = set()
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
        backings = []
        if config.disk is not None:
            from kvstrata.tiers.disk import DiskTier

            try:
                tier = DiskTier(config.disk.path)
            except (ConfigError, Incompatible, TierUnavailable) as error:
                logger.error("the disk tier is off: %s", error)
                counters.add("tiers_left_out_total", tier="disk")
            else:
                backings.append(
                    Backing(
                        tier,
                        config.disk.capacity,
                        create_policy(config.disk.policy, config.disk.capacity, clock),
                        num_threads=config.disk.io_threads,
                        deadline_s=config.deadlines.load,
                        counters=counters,
                        clock=clock,
                    )
                )
        return cls(config, pool, backings, counters, clock)

    async def start(self) -> None:
        """Begin the background work: fault the pool in, scan the tiers, scrub them."""
        self.host.pool.populate()
        spawn = asyncio.get_running_loop().create_task
        for backing in self.backings:
            self._background.append(spawn(self._scan(backing)))
            self._background.append(spawn(self._maintain(backing)))

    async def stop(self, drain_s: float = 10.0) -> None:
        """Write behind what is queued, for ``drain_s`` at most, and release everything."""
        try:
            await asyncio.wait_for(self.movement.flush(), drain_s)
        except asyncio.TimeoutError:
            logger.warning("stopped with %d bytes not yet written", self.movement.queued_bytes)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.movement.close()
        for backing in self.backings:
            backing.close()
        self.host.close()

    def handle(self, client: Client, message: p.Request) -> Answer:
        """Answer one request: at once, later, or not at all (see the protocol page)."""
        return self._handlers[type(message)](client, message)

    def end(self, client: Client) -> None:
        """Let go of all that a client holds: it is dead, or said that no copy is under way."""
        for lease in list(client.leases.values()):
            self.leases.release(lease)
        for reservation in list(client.reservations.values()):
            self._finish(reservation, [NOT_WRITTEN] * len(reservation.slots))

    # reading

    def match(self, client: Client, message: p.Match) -> p.Matched:
        """Lease the leading chunks that exist, and start to promote those in slower tiers."""
        keys, parts, orders = p.split(message.keys, 32), message.parts, frozenset(message.orders)
        if not parts:
            raise UsageError("a match must name the parts that make up a chunk")
        room = self.leases.room_for(client)
        slots: list[Slot | None] = []
        pending: list[tuple[int, bytes, int, int, Backing]] = []
        tiers = bytearray()
        for key in keys:
            located = self._locate(key, parts, orders)
            if located is None:
                break
            room -= sum(
                where.nbytes if isinstance(where, Slot) else where[1] for where, _ in located
            )
            if room < 0:
                self.counters.add("matches_cut_total", why="leases")
                break
            for part, (where, _) in zip(parts, located, strict=True):
                if isinstance(where, Slot):
                    self.host.hold(where)
                    slots.append(where)
                else:
                    pending.append((len(slots), key, part, where[1], where[0]))
                    slots.append(None)
            tiers.append(max(number for _, number in located))
        num_chunks = len(tiers)
        for position, key, part, nbytes, backing in pending:
            if position >= num_chunks * len(parts):
                break
            slots[position] = self.movement.promote(key, part, nbytes, backing)
            if slots[position] is None:
                num_chunks = position // len(parts)
                self.counters.add("matches_cut_total", why="room")
        for slot in slots[num_chunks * len(parts) :]:
            if slot is not None:
                self.host.unhold(slot)
        held = [slot for slot in slots[: num_chunks * len(parts)] if slot is not None]
        del tiers[num_chunks:]
        self._count_match(keys, tiers)
        if not held:
            return p.Matched(message.id, 0, b"", b"")
        lease = self.leases.grant(client, held, len(parts), orders)
        self._sample(keys, parts, held)
        return p.Matched(message.id, lease.id, bytes(tiers), _offsets(held))

    def await_arrival(self, client: Client, message: p.Await) -> Answer:
        """Answer when more chunks of a lease are in host memory, or one will not come."""
        lease = self.leases.get(message.lease)
        if lease is None:
            raise UsageError(f"there is no lease {message.lease}")

        def arrived() -> p.Arrived:
            slots = lease.slots[message.have * lease.num_parts : lease.ready * lease.num_parts]
            return p.Arrived(message.id, lease.ready, lease.failed, _offsets(slots))

        if lease.settled(message.have):
            return arrived()
        future: asyncio.Future[p.Reply] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not future.done():
                future.set_result(arrived())

        lease.listeners.append((message.have, tell))
        return future

    def release(self, client: Client, message: p.Release) -> None:
        """End a lease, or all of it but its first chunks."""
        lease = self.leases.get(message.lease)
        if lease is not None:
            self.leases.release(lease, message.keep)

    def lookup(self, client: Client, message: p.Lookup) -> p.Found:
        """Say where each chunk is; changes nothing."""
        tiers = bytearray()
        for key in p.split(message.keys, 32):
            located = self._locate(key, message.parts, None)
            tiers.append(p.ABSENT if located is None else max(number for _, number in located))
        return p.Found(message.id, bytes(tiers))

    # writing

    def reserve(self, client: Client, message: p.Reserve) -> p.Reserved:
        """Give out slots for the chunks ``prefix[first:]``, head first, as far as there is room."""
        prefix, template, part = p.split(message.prefix, 32), message.template, message.part
        if not 0 <= message.first < len(prefix) or len(message.namespace) != 32:
            raise UsageError("a reservation needs a namespace and at least one chunk")
        order, nbytes = order_name(template.kind, template.order), stored_bytes(template.raw_length)
        reservation = Reservation(
            next(self._numbers),
            client,
            message.namespace,
            prefix,
            message.first,
            part,
            template,
            message.cost,
            [],
        )
        offsets = array("q")
        refusal = 0
        for key in prefix[message.first :]:
            slot, answer = None, refusal
            if not answer:
                answer = self._presence(key, part, order)
            if not answer and client.reserved_bytes + nbytes > self.leases.per_client_bytes:
                answer = refusal = p.REFUSED
            if not answer:
                slot = self.host.allocate(nbytes)
                if slot is None:
                    answer = refusal = p.FULL
            if slot is not None:
                client.reserved_bytes += nbytes
                self._writing[key, part] = reservation
            offsets.append(answer if slot is None else slot.offset)
            reservation.slots.append(slot)
        if any(slot is not None for slot in reservation.slots):
            client.reservations[reservation.id] = reservation
            self._reservations[reservation.id] = reservation
        return p.Reserved(message.id, reservation.id, offsets.tobytes())

    def commit(self, client: Client, message: p.Commit) -> p.Done:
        """Publish what was written into reserved slots; the rest of them go back."""
        reservation = self._reservations.get(message.reservation)
        if reservation is None:
            return p.Done(message.id, 0)
        if reservation.client is not client:
            raise UsageError("a reservation is committed on the connection that made it")
        checksums = p.split(message.checksums, 16)
        if len(checksums) != len(reservation.slots):
            raise UsageError(f"{len(reservation.slots)} checksums expected, not {len(checksums)}")
        return p.Done(message.id, self._finish(reservation, checksums))

    # operating

    def clear(self, client: Client, message: p.Clear) -> Awaitable[p.Reply]:
        """Forget some chunks, or all, in some tiers, or all."""
        names = {"host", *(backing.name for backing in self.backings)}
        if unknown := set(message.tiers) - names:
            raise UsageError(f"no tier {unknown.pop()!r} here; there are {sorted(names)}")
        tiers = set(message.tiers) or names
        wanted = None if message.keys is None else set(p.split(message.keys, 32))
        self.movement.forget(wanted)
        for reservation in self._reservations.values():
            chunks = reservation.prefix[reservation.first :]
            reservation.unwanted.update(chunks if wanted is None else wanted & set(chunks))
        count = 0
        if "host" in tiers:
            for key in list(self.host.index.keys() if wanted is None else wanted):
                count += self.host.drop(key)

        async def finish() -> p.Reply:
            total = count
            for backing in self.backings:
                if backing.name in tiers:
                    total += await (
                        backing.clear()
                        if wanted is None
                        else backing.drop([key for key in wanted if key in backing.index])
                    )
            return p.Done(message.id, total)

        return finish()

    def flush(self, client: Client, message: p.Flush) -> Awaitable[p.Reply]:
        """Answer once nothing is left to write behind."""

        async def finish() -> p.Reply:
            await self.movement.flush()
            return p.Done(message.id, 0)

        return finish()

    def record(self, client: Client, message: p.Record) -> None:
        """Keep one request's record for the operator."""
        self.records.append(message.record)
        self.counters.add("requests_total", outcome=str(message.record.get("outcome", "")))

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
                    "reservations": len(self._reservations),
                },
                "tiers": [
                    {
                        "name": backing.name,
                        "state": backing.state,
                        "capacity_bytes": backing.index.capacity_bytes,
                        "used_bytes": backing.index.used_bytes,
                        "num_chunks": len(backing.index),
                        "num_objects": backing.index.num_objects,
                        "queued_bytes": self.movement.queued_bytes,
                    }
                    for backing in self.backings
                ],
                "counters": self.counters.snapshot(),
                "requests": list(self.records)[-32:],
            },
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the conservation laws hold: every byte has one owner."""
        reserved = [
            slot for r in self._reservations.values() for slot in r.slots if slot is not None
        ]
        self.host.check_integrity([*reserved, *self.movement.filling()])
        self.leases.check_integrity()
        for backing in self.backings:
            backing.index.check_integrity()
        for reservation in self._reservations.values():
            assert reservation.client.reservations.get(reservation.id) is reservation
        for client in {r.client for r in self._reservations.values()}:
            held = [s for r in client.reservations.values() for s in r.slots if s is not None]
            assert client.reserved_bytes == sum(slot.nbytes for slot in held)
        assert self._until_verify >= 0

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
                nbytes = backing.index.get(key, part) if backing.readable else None
                if nbytes is not None:
                    slot = self.movement.arriving.get((key, part))
                    located.append(((backing, nbytes) if slot is None else slot, number))
                    break
            else:
                return None
        return located

    def _presence(self, key: bytes, part: int, order: str) -> int:
        """Why an object need not be written: `PRESENT`, `BUSY`; 0 when it does need it."""
        if (key, part) in self._writing:
            return p.BUSY
        slot = self.host.get(key, part)
        if slot is not None:
            # In another order it is of no use to this writer's kind of engine, and may be replaced.
            return p.PRESENT if slot.order == order else 0
        if (key, part) in self.movement.arriving:
            return p.PRESENT
        stored = any(b.readable and b.index.get(key, part) is not None for b in self.backings)
        return p.PRESENT if stored else 0

    def _finish(self, reservation: Reservation, checksums: list[bytes]) -> int:
        """End a reservation: publish the slots that have a checksum, give back the others."""
        client, part, first = reservation.client, reservation.part, reservation.first
        del client.reservations[reservation.id]
        del self._reservations[reservation.id]
        written: list[int] = []
        for i, slot in enumerate(reservation.slots):
            if slot is None:
                continue
            key = reservation.prefix[first + i]
            del self._writing[key, part]
            client.reserved_bytes -= slot.nbytes
            if checksums[i] == NOT_WRITTEN or key in reservation.unwanted:
                self.host.discard(slot)
                self.host.unhold(slot)
            else:
                self._write_header(reservation, first + i, slot, checksums[i])
                written.append(i)
        # Tails enter the policy before heads, so that they leave it first.
        for i in reversed(written):
            slot, key = reservation.slots[i], reservation.prefix[first + i]
            assert slot is not None
            order = order_name(reservation.template.kind, reservation.template.order)
            self.host.publish(key, part, slot, order, reservation.cost or 1.0)
        self.host.index.touch(reservation.prefix[:first])
        for i in written:
            slot, key = reservation.slots[i], reservation.prefix[first + i]
            assert slot is not None
            self.movement.write_behind(key, part, slot, reservation.cost or 1.0)
            self.host.unhold(slot)
        self.counters.add("stored_objects_total", len(written))
        return len(written)

    def _write_header(
        self, reservation: Reservation, number: int, slot: Slot, checksum: bytes
    ) -> None:
        template = reservation.template
        header = ObjectHeader(
            namespace=reservation.namespace,
            key=reservation.prefix[number],
            parent=reservation.prefix[number - 1] if number else NO_PARENT,
            start=number * template.num_tokens,
            num_tokens=template.num_tokens,
            group=reservation.part >> 16,
            rank=reservation.part & 0xFFFF,
            kind=template.kind,
            order=template.order,
            dtype=template.dtype,
            shape=tuple(template.shape),
            codec=template.codec,
            codec_parameters=template.codec_parameters,
            epoch=self.backings[0].tier.epoch if self.backings else 0,
            created_ns=time.time_ns(),
            raw_length=template.raw_length,
            stored_length=template.raw_length,
            raw_checksum=checksum,
            stored_checksum=checksum,
        )
        view = self.host.pool.view(slot.offset, slot.nbytes)
        view[:HEADER_BYTES] = header.encode()
        padding = slot.nbytes - HEADER_BYTES - template.raw_length
        if padding:
            view[-padding:] = bytes(padding)

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
            backing.index.touch(found)

    def _sample(self, keys: list[bytes], parts: list[int], slots: list[Slot]) -> None:
        """Verify one host hit in ``verify_every``, in a thread, while it is held."""
        if not self.config.host.verify_every:
            return
        self._until_verify -= len(slots)
        if self._until_verify > 0:
            return
        self._until_verify = self.config.host.verify_every
        position = next(self._numbers) % len(slots)
        slot = slots[position]
        if slot.state is SlotState.READY:
            key, part = keys[position // len(parts)], parts[position % len(parts)]
            self.host.hold(slot)
            task = asyncio.get_running_loop().create_task(self._verify(key, part, slot))
            self._verifying.add(task)
            task.add_done_callback(self._verifying.discard)

    async def _verify(self, key: bytes, part: int, slot: Slot) -> None:
        view = self.host.pool.view(slot.offset, slot.nbytes)
        try:
            await asyncio.to_thread(verify_object, view, identity(key, part))
            self.counters.add("verified_objects_total", tier="host")
        except CorruptObject as error:
            logger.error("host memory: an object is rejected: %s", error)
            self.counters.add("corrupt_objects_total", tier="host")
            if self.host.get(key, part) is slot:
                self.host.drop_object(key, part)
        finally:
            self.host.unhold(slot)

    async def _scan(self, backing: Backing) -> None:
        await backing.scan()
        rate = self.config.disk.scrub_rate if self.config.disk else 0
        if rate:
            await scrub(backing, rate)

    async def _maintain(self, backing: Backing) -> None:
        while True:
            await asyncio.sleep(NOTE_USE_S)
            await backing.note_use()


def _offsets(slots: list[Slot]) -> bytes:
    """Offsets of ready slots, `ARRIVING` for the others, as packed 64-bit numbers."""
    return array(
        "q",
        [slot.offset if slot.state is not SlotState.FILLING else p.ARRIVING for slot in slots],
    ).tobytes()
