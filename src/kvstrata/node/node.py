"""The node's decisions: what a prompt's match is, who gets slots, when an object exists.

`Node` is plain state on one event loop; it knows nothing of sockets. `server.py` puts it behind
one, and tests call it directly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any

import kvstrata
from kvstrata.config import Config, host_capacity_bytes
from kvstrata.config.tracing import open_tracer
from kvstrata.errors import UsageError
from kvstrata.memory.machine import available_bytes
from kvstrata.memory.pool import Pool
from kvstrata.node.answering import Answers, nothing_of
from kvstrata.node.arriving import arrival
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.changes import Changes
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.common.wall import WallClock
from kvstrata.node.grouped import GroupMatcher
from kvstrata.node.insides import Insides
from kvstrata.node.lending import Lender
from kvstrata.node.locating import presence
from kvstrata.node.opening import open_backings
from kvstrata.node.operating.canary import Canary
from kvstrata.node.operating.explaining import Explainer
from kvstrata.node.operating.flow import Flow
from kvstrata.node.operating.holdings import holdings
from kvstrata.node.operating.measuring import Measures
from kvstrata.node.operating.operations import Operations
from kvstrata.node.operating.reasons import Reasons
from kvstrata.node.operating.tenants import Tenants
from kvstrata.node.operating.watching import Watching
from kvstrata.node.records import Records
from kvstrata.node.searching import check_tiers
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.expecting import Expecting
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.scrub import scrub
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import FINISH_SLICE, Reservation, ReservationTable
from kvstrata.node.slots.sampling import Sampler
from kvstrata.observe.counters import Counters
from kvstrata.observe.tracing import Tracer, around
from kvstrata.policies import create_policy
from kvstrata.tiers.journal import Journal
from kvstrata.tiers.marks import Whose
from kvstrata.transfer.borrowing import Nixl
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)

UPKEEP_S = 10.0

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
        nixl: of the pool; likewise owned.
        tracer: of requests that are traced; likewise owned.
        journal: where what an operator says of host memory outlives the process.
    """

    def __init__(
        self,
        config: Config,
        pool: Pool,
        backings: Sequence[Backing],
        counters: Counters,
        left_out: dict[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        nixl: Nixl | None = None,
        tracer: Tracer | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.config = config
        self.left_out = left_out or {}
        self.wall = WallClock()
        self.address = ""  # where other nodes find this one; empty: nowhere
        self.counters, self.backings = counters, backings
        capacity = pool.capacity_bytes
        per_client = int(config.leases.per_client * capacity)
        self.host = HostMemory(pool, create_policy(config.host.policy, capacity, clock), counters)
        self.changes = Changes()
        self.changes.watch(Flow(counters))
        self.host.index.tell("host", self.changes)
        for backing in backings:
            if isinstance(backing, OwnedBacking):
                backing.index.tell(backing.name, self.changes)
                backing.wall = self.wall
        self.watching = Watching(self.changes, ["host", *(one.name for one in backings)])
        self.fleet_state: Callable[[], dict[str, Any]] | None = None
        self.leases = LeaseTable(self.host, per_client, int(config.leases.total * capacity))
        self.reservations = ReservationTable(self.host, per_client, self._date)
        self.movement = Movement(self.host, self.leases, backings, counters, clock, tracer)
        self.records = Records(counters, ["host", *(backing.name for backing in backings)])
        self._expecting = Expecting(self.movement, counters, clock)
        self._sampler = Sampler(self.host, config.host.verify_every, counters)
        reasons = Reasons(self.host, self.changes, backings, self.reservations,
                          self.records.described, clock)  # fmt: skip
        self._matcher = GroupMatcher(
            self.host, self.leases, self.movement, self.reservations, self._sampler,
            self._expecting, backings, counters, Answers(backings, counters, reasons),
            planning=config.planner == "on", describe=self.records.described,
        )  # fmt: skip
        self.insides = Insides(self.host, self.leases, self.movement, self._matcher, self._sampler,
                               backings, counters, self.changes,
                               lambda: self.operations.drainer.closing)  # fmt: skip
        self._explainer = Explainer(self.records.find, self._matcher.look, reasons)
        self.lender = Lender(self.host, per_client, counters, clock)
        self.nixl, self._tracer = nixl, tracer
        self.operations = Operations(
            config, self.host, self.leases, self.reservations, self.movement, backings, counters,
            match=self._matcher.match, look=self._matcher.look, release=self._matcher.release,
            plan=self._plan, describe=self.records.described,
            sampler=self._sampler, changes=self.changes, address=lambda: self.address,
        )  # fmt: skip
        self._matcher.used = self.operations.lineage.used
        self.tenants = Tenants(self.host, self.reservations, self.movement, self.operations,
                               backings, config.pins, journal or Journal(), counters,
                               self.wall)  # fmt: skip
        self.changes.watch(self.tenants.pinning)
        self._clock, self._started = clock, clock()
        self.canary = Canary(self.host, backings, counters)
        self.measures = Measures(
            counters, self.host, self.leases, self.reservations, self.movement, backings,
            self.canary, lambda: self.lender.kept_bytes, lambda: clock() - self._started,
            lambda: len(self.tenants.pinning),
        )  # fmt: skip
        self._tasks = Tasks(counters)
        self._handlers: dict[type, Callable[[Client, Any], Answer]] = {
            p.Match: self.match,
            p.Inside: self.insides.inside,
            p.Await: self.await_arrival,
            p.Release: self.release,
            p.Reserve: self.reserve,
            p.Commit: self.commit,
            p.Lookup: self.lookup,
            p.Clear: self.clear,
            **self.tenants.handlers,
            p.Flush: self.flush,
            p.Status: self.status,
            p.Metrics: self.measures.answer,
            p.Record: self.record,
            p.Records: self.records.answer,
            p.Watch: self.watching.watch,
            **self.operations.handlers,
            p.Explain: self._explainer.explain,
        }

    @classmethod
    def create(
        cls,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> Node:
        """A node as configured; one without the tiers that cannot be opened, which the log says."""
        counters = Counters()
        pool = Pool.create(host_capacity_bytes(config, available_bytes()))
        try:
            memory = pool.view(0, pool.capacity_bytes)
            backings, left_out, nixl = open_backings(config, memory, counters, clock)
        except BaseException:
            pool.close()
            raise
        tracer = open_tracer(config.tracing, "kvstrata-node")
        return cls(config, pool, backings, counters, left_out, clock, nixl, tracer, journal)

    async def start(self) -> None:
        """Begin the background work: fault the pool in, scan the tiers, scrub them."""
        self.host.pool.populate()
        self._tasks.spawn("the upkeep of what is lent", self.lender.run())
        self.canary.start(self.config.canary, self._tasks)
        self._tasks.spawn("the end of pins", self.tenants.pinning.run())
        for backing in self.backings:
            self._tasks.spawn(f"the tier {backing.name}", self._run(backing))
            self._tasks.spawn(f"the upkeep of {backing.name}", self._maintain(backing))

    async def stop(self, drain_s: float = 10.0) -> None:
        """Write behind what is queued, for ``drain_s`` at most, and release everything."""
        await self.operations.close(min(2.0, drain_s))
        try:
            await asyncio.wait_for(self.movement.flush(), drain_s)
            for backing in self.backings:
                await asyncio.wait_for(backing.upkeep(), drain_s)
        except asyncio.TimeoutError:
            logger.warning("stopped with %d bytes not yet written", self.movement.queued_bytes)
        await self._tasks.cancel()
        await self._expecting.close()
        await self._sampler.close()
        await self.movement.close(min(2.0, drain_s))
        for backing in self.backings:
            await backing.stop()
            backing.close()
        if self.nixl is not None:
            self.nixl.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        self.host.close()

    def handle(self, client: Client, message: p.Request) -> Answer:
        """Answer one request: at once, later, or not at all (see the protocol page)."""
        p.check_limits(message)
        if not isinstance(message, p.Release):
            self._matcher.end_releases(client)
        return self._handlers[type(message)](client, message)

    def end(self, client: Client) -> None:
        """Let go of all that a client holds: it is dead, or said that no copy is under way."""
        client.ended = True
        for number in list(client.leases):
            self._end("a lease", self._matcher.release_slowly(self.leases[number]))
        for number in list(client.reservations):
            self._end("a reservation", self.reservations.abort(self.reservations[number]))

    def _end(self, what: str, work: Work[None]) -> None:
        rest = in_slices(work)
        if rest is not None:
            self._tasks.spawn(f"an end of {what}", _finish(rest))

    # reading

    def match(self, client: Client, message: p.Match) -> p.Matched | Awaitable[p.Matched]:
        """Lease the leading chunks that exist, and start to promote those in slower tiers."""
        check_tiers(message.tiers, self.backings)
        if self.operations.drainer.closing:
            return nothing_of(message)
        match = partial(self._matcher.match, client, message)
        return around(self._tracer, "kvstrata.node.match", message.traceparent, match)

    def await_arrival(self, client: Client, message: p.Await) -> Answer:
        """Answer when more chunks of a lease are in host memory, or one will not come.

        Any connection may ask: of one engine a scheduler leases, and its workers load.
        """
        return arrival(self.leases, message)

    def release(self, client: Client, message: p.Release) -> None:
        """End a lease, or all of it but its first chunks."""
        lease = self.leases.get(message.lease)
        if lease is not None:
            if lease.client is not client:
                raise UsageError("a lease is released on the connection that was granted it")
            if not lease.whole:
                raise UsageError(f"lease {lease.id} is of a match that is under way")
            if message.keep and lease.shape and message.keep != lease.boundary:
                raise UsageError("what a boundary needs is of no use in part, so it ends whole")
            self._end("a lease", self._matcher.release_slowly(lease, message.keep))

    def lookup(self, client: Client, message: p.Lookup) -> p.Found | Awaitable[p.Found]:
        """Say where each chunk is; changes nothing."""
        return self._matcher.lookup(message)

    # writing

    def reserve(self, client: Client, message: p.Reserve) -> p.Reserved | Awaitable[p.Reserved]:
        """Give out slots for the chunks ``prefix[first:]``, head first, as far as there is room."""
        check_tiers(message.tiers, self.backings)

        def work() -> Generator[None, None, p.Reserved]:
            presence = self._none_taken if self.operations.drainer.draining else self._presence
            granted = yield from self.reservations.grant(client, message, presence)
            reservation, offsets = granted
            if message.lend:
                self.lender.keep_present(reservation, offsets)
            return p.Reserved(message.id, reservation.id, offsets.tobytes())

        return in_slices(work())

    def commit(self, client: Client, message: p.Commit) -> p.Done | Awaitable[p.Done]:
        """Publish what was written into reserved slots; the rest of them go back."""
        reservation = self.reservations.get(message.reservation)
        if reservation is None:
            return p.Done(message.id, 0)
        if reservation.client is not client:
            raise UsageError("a reservation is committed on the connection that made it")
        checksums = p.split(message.checksums, 16)
        if len(checksums) != len(reservation.slots):
            raise UsageError(f"{len(reservation.slots)} checksums expected, not {len(checksums)}")
        commit = partial(in_slices, self._commit(reservation, checksums, message.id))
        return around(self._tracer, "kvstrata.node.commit", reservation.trace, commit)

    def _commit(self, reservation: Reservation, checksums: list[bytes], id: int) -> Work[p.Done]:
        written = yield from self.reservations.finish(reservation, checksums)
        wanted = [one for one in written if one[0] not in reservation.unwanted]
        # A tail without marks is for another engine, which comes for it to host memory.
        if wanted and (reservation.marks or not reservation.is_tail):
            origin = Origin.of(reservation, wanted[-1][0])
            yield from self.movement.write_behind(origin, wanted)
        for number, (key, slot) in enumerate(written, 1):
            if reservation.lend:
                self.lender.keep(key, reservation.part)
            self.host.unhold(slot)
            self.insides.replace(key)
            if number % FINISH_SLICE == 0:
                yield None
        self.counters.add("stored_objects_total", len(written))
        return p.Done(id, len(written))

    # operating

    def clear(self, client: Client, message: p.Clear) -> Awaitable[p.Reply]:
        """Forget some chunks, or all, in some tiers, or all."""
        return self.tenants.clearing.clear(message)

    def flush(self, client: Client, message: p.Flush) -> Awaitable[p.Reply]:
        """Answer once what was committed so far has been written behind, or given up."""

        finishing = set(self.reservations.finishing)

        async def finish() -> p.Reply:
            while finishing & self.reservations.finishing:
                await asyncio.sleep(0)
            await self.movement.flush()
            return p.Done(message.id, 0)

        return finish()

    def record(self, client: Client, message: p.Record) -> None:
        """Keep one request's record, or what a namespace is made of, for the operator."""
        self._explainer.complete(message.record)
        self.records.note(message.record)

    def status(self, client: Client, message: p.Status) -> p.State:
        """Everything an operator may ask of a node."""
        held = holdings(self.host, self.config.host.policy, self.leases, self.reservations,
                        self.movement, self.backings)  # fmt: skip
        return p.State(
            message.id,
            {
                "release": kvstrata.__version__,
                "pid": os.getpid(),
                "uptime_s": round(self._clock() - self._started, 1),
                "now": self.wall() / 1e9,
                **held,
                "num_pins": len(self.tenants.pinning),
                "tiers_left_out": self.left_out,
                **({"fleet": self.fleet_state()} if self.fleet_state is not None else {}),
                **self.operations.state(),
                "counters": self.counters.snapshot(),
                **self.records.shown(),
            },
        )

    def check_integrity(self, contents: bool = False) -> None:
        """Raise AssertionError unless the conservation laws hold: every byte has one owner.

        Args:
            contents: scan the tiers too; blocks.
        """
        self.host.check_integrity(
            [*self.reservations.filling(), *self.movement.filling(), *self.operations.filling()]
        )
        self.leases.check_integrity(self.movement.under_way())
        self.insides.children.check_integrity()
        self.movement.check_integrity()
        self.reservations.check_integrity()
        self.tenants.pinning.check_integrity()
        for backing in self.backings:
            backing.check_integrity()
            if contents and isinstance(backing, OwnedBacking):
                backing.check_contents()

    # how

    def _presence(self, key: bytes, part: int, order: str) -> int:
        return presence(self.host, self.backings, key, part, order)

    def _plan(self, planning: bool) -> None:
        self._matcher.planning = planning

    def _none_taken(self, key: bytes, part: int, order: str) -> int:
        """The same of a node that is being drained."""
        return self._presence(key, part, order) or p.DRAINING

    def _date(self, whose: Whose) -> int:
        """When what is stored now was created: behind everything that was cleared."""
        now = self.wall()
        return max([one.marks.date(whose, now) for one in self.backings], default=now)

    async def _run(self, backing: Backing) -> None:
        await backing.run()
        if isinstance(backing, OwnedBacking):
            await backing.read_headers(self.insides.lacks)
            await scrub(backing)

    async def _maintain(self, backing: Backing) -> None:
        while True:
            await asyncio.sleep(UPKEEP_S)
            await backing.upkeep()


async def _finish(rest: Awaitable[None]) -> None:
    await rest
