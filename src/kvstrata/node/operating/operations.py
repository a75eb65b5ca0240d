"""An operator's requests, each with what answers it: the jobs, and what is answered at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from blake3 import blake3

from kvstrata.config import Config
from kvstrata.errors import Busy, UsageError
from kvstrata.node.common.background import NICE, Threads
from kvstrata.node.common.changes import Changes
from kvstrata.node.operating.copying import Copier, taken_in
from kvstrata.node.operating.directory import Directory
from kvstrata.node.operating.draining import Drainer
from kvstrata.node.operating.explaining import Looked
from kvstrata.node.operating.jobs import Job, JobTable, Work
from kvstrata.node.operating.lineage import Lineage
from kvstrata.node.operating.looking import Looker
from kvstrata.node.operating.places import HOST, Made, Places
from kvstrata.node.operating.prefetching import Prefetcher, Sender, Sought
from kvstrata.node.operating.reloading import Reloader
from kvstrata.node.operating.transcoding import Transcoder
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.movement import Movement
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import Lease, LeaseTable
from kvstrata.node.slots.reservations import ReservationTable
from kvstrata.node.slots.sampling import Sampler
from kvstrata.node.slots.slot import Slot
from kvstrata.observe.counters import Counters
from kvstrata.transfer import peers as peers_protocol
from kvstrata.transfer.tcp import Address
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p
from kvstrata.wire.namespaces import Described

THREADS = 2
MAX_FETCHES = 4
"""Jobs that other nodes may have running here at once: they leave room for the operator's."""

Answer = o.Reply | p.Done | Awaitable[p.Reply]
Handler = Callable[[Client, Any], Answer]


class Operations:
    """What a node does for its operator.

    Args:
        config: the one that it was started with.
        host: host memory.
        leases: of host memory.
        reservations: of host memory.
        movement: of what is written behind.
        backings: the slower tiers.
        counters: the node's.
        match: as `Node.match`.
        look: says what of a prompt a match would lease.
        release: ends a lease.
        plan: turns planning on and off.
        describe: what a namespace is made of, by its digest; None: nobody has said.
        sampler: of what is verified.
        changes: of the node's own tiers.
        address: where other nodes find this one.
    """

    def __init__(
        self,
        config: Config,
        host: HostMemory,
        leases: LeaseTable,
        reservations: ReservationTable,
        movement: Movement,
        backings: Sequence[Backing],
        counters: Counters,
        *,
        match: Callable[[Client, p.Match], p.Matched | Awaitable[p.Matched]],
        look: Callable[[p.Lookup], Awaitable[Looked]],
        release: Callable[[Lease], None],
        plan: Callable[[bool], None],
        describe: Callable[[bytes], Described | None],
        sampler: Sampler,
        changes: Changes,
        address: Callable[[], str],
    ) -> None:
        places = Places(host, backings)
        self.jobs = JobTable(counters)
        self.lineage = Lineage(host)
        self.directory = Directory(places.holders())
        changes.watch(self.directory)
        changes.watch(self.lineage)
        self.drainer = Drainer(reservations, leases, movement, self._end_others)
        self._threads = Threads(THREADS, "kvstrata-operating", NICE)
        self._places, self._describe = places, describe
        self._copier = Copier(places, self._threads)
        self._looker = Looker(places, self._threads, self.directory, self.lineage)
        self._prefetcher = Prefetcher(places, leases, self._copier, match, release, describe)
        self._sender = Sender(places, self._prefetcher, look, address)
        self._reloading = asyncio.Lock()  # each begins from what the one before has left
        self._reloader = Reloader(config, places, leases, reservations, sampler, plan)
        self._transcoder = Transcoder(places, self._copier, self.directory, config.quality)

    @property
    def handlers(self) -> dict[type, Handler]:
        """What answers each request."""
        return {
            o.Jobs: self._jobs,
            o.Cancel: self._cancel,
            o.Prefetch: self._prefetch,
            o.Copy: self._copy,
            o.Move: self._copy,
            o.Send: self._send,
            o.Transcode: self._transcode,
            o.Scrub: self._scrub,
            o.Inspect: lambda _, message: self._looker.inspect(message),
            o.List: lambda _, message: self._looker.list(message),
            o.Drain: self._drain,
            o.Undrain: lambda _, message: p.Done(message.id, int(self.drainer.undo())),
            o.Reload: lambda _, message: self._reload(message),
        }

    def forget(self, keys: set[bytes] | None) -> None:
        """Store nothing that is on its way of these chunks (None: of all)."""
        self._copier.forget(keys)

    def filling(self) -> list[Slot]:
        """The slots of host memory that jobs are filling."""
        return self._copier.filling()

    def state(self) -> dict[str, Any]:
        """For a status."""
        return {"draining": self.drainer.state, "jobs": [job.id for job in self.jobs.running]}

    async def close(self, grace_s: float) -> None:
        """End all jobs."""
        await self.jobs.close(grace_s)
        self._threads.close()

    def fetch(
        self, request: peers_protocol.Fetch | peers_protocol.Watch
    ) -> peers_protocol.Fetching:
        """Another node asks for something to be fetched from it, or how far that is.

        Raises:
            UsageError, Busy: it may not be, and why.
        """
        if isinstance(request, peers_protocol.Watch):
            job = self.jobs.get(request.job)
            if job is None or job.kind != "fetch":
                raise UsageError("there is no such job any more")
            return _fetching(job)
        if self._places.peers is None:
            raise UsageError("this node asks no others: see peer.nodes and peer.named there")
        address, why = self._places.peers.named(request.address)
        if address is None:
            raise UsageError(why)
        made = Made.checked(request.parts, request.orders, request.namespace, request.needs)
        made.check_for(self._places.peers)
        sought = Sought(made, tuple(request.lengths), peer=address)
        packed = b"".join(request.keys)
        job, _ = self._start(
            "fetch", f"{len(request.keys)} chunks from {address}", request,
            lambda job: self._prefetcher.run(job, packed, sought), most=MAX_FETCHES,
        )  # fmt: skip
        return _fetching(job)

    def _jobs(self, client: Client, message: o.Jobs) -> o.JobPage:
        jobs, following = self.jobs.page(message.after, message.limit)
        return o.JobPage(message.id, [job.told() for job in jobs], following)

    def _cancel(self, client: Client, message: o.Cancel) -> p.Done:
        if self.jobs.get(message.job) is None:
            raise UsageError(f"there is no job {message.job}, or it ended too long ago")
        return p.Done(message.id, int(self.jobs.cancel(message.job)))

    def _prefetch(self, client: Client, message: o.Prefetch) -> o.Started:
        about = f"{_count(message.keys)} chunks into {HOST}"
        sought = Sought(self._made(message), tuple(message.lengths), message.owner)
        return self._started("prefetch", about, message,
            lambda job: self._prefetcher.run(job, message.keys, sought))  # fmt: skip

    def _made(self, message: o.Prefetch | o.Copy | o.Send | o.Transcode) -> Made:
        told = self._describe(message.namespace)
        needs = told.needs_of(message.parts) if told is not None else ()
        return Made.checked(message.parts, message.orders, message.namespace, needs)

    def _copy(self, client: Client, message: o.Copy) -> o.Started:
        made = self._made(message)
        kind = "move" if isinstance(message, o.Move) else "copy"
        self._copier.check(message.source, message.target, made, moves=kind == "move")
        about = f"{_count(message.keys)} chunks from {message.source} to {message.target}"

        async def work(job: Job) -> None:
            keys = await taken_in(message.keys)
            await self._copier.run(
                job, keys, message.source, message.target, made, moves=kind == "move"
            )

        return self._started(kind, about, message, work)

    def _send(self, client: Client, message: o.Send) -> o.Started:
        peer: Address = self._sender.checked(message.peer)
        sought = Sought(self._made(message), tuple(message.lengths))
        return self._started("send", f"{_count(message.keys)} chunks to {peer}", message,
            lambda job: self._sender.run(job, message.keys, peer, sought))  # fmt: skip

    def _transcode(self, client: Client, message: o.Transcode) -> Awaitable[p.Reply]:
        made = self._made(message)
        backing = self._transcoder.check(message.tier, message.keys, made)
        what = "all" if message.keys is None else f"{_count(message.keys)} chunks"
        about = f"{what} of {message.tier} to {message.codec or 'its own codec'}"

        async def start() -> p.Reply:
            choice = await self._transcoder.choice(backing, message.codec)
            return self._started("transcode", about, message, lambda job: self._transcoder.run(
                job, backing, choice, message.keys, made))  # fmt: skip

        return start()

    def _scrub(self, client: Client, message: o.Scrub) -> o.Started:
        self._places.owned_named(message.tier)
        return self._started(
            "scrub", message.tier, message, lambda job: self._looker.scrub(job, message.tier)
        )

    def _drain(self, client: Client, message: o.Drain) -> o.Started:
        self.drainer.begin(end=message.end)
        same = msgspec.structs.replace(message, end=False)
        return self._started("drain", "until nothing is left to write", same, self.drainer.run)

    async def amend(self, options: dict[str, Any]) -> o.Reloaded:
        """Hold the node to the configuration that it has, but for these options, by their paths.

        Raises:
            ConfigError: as of `Reloader.check`.
        """
        async with self._reloading:
            return await self._hold_to(self._reloader.amended(options), 0)

    async def _reload(self, message: o.Reload) -> p.Reply:
        async with self._reloading:
            return await self._hold_to(message.config, message.id)

    async def _hold_to(self, config: dict[str, Any], id: int) -> o.Reloaded:
        new, changed, engines = await self._copier.do(partial(self._reloader.check, config))
        self._reloader.apply(new, changed)
        return o.Reloaded(id, changed, engines)

    def _started(self, kind: str, about: str, message: o.Working, work: Work) -> o.Started:
        """Begin a job, or say which one does that already."""
        job, again = self._start(kind, about, msgspec.structs.replace(message, id=0), work)
        return o.Started(message.id, job.id, again)

    def _start(
        self, kind: str, about: str, asked: msgspec.Struct, work: Work, **bounds: int
    ) -> tuple[Job, bool]:
        if self.drainer.draining and kind != "drain":
            raise Busy("the node is being drained, and begins nothing")
        same = blake3(msgspec.msgpack.encode(asked)).digest()
        return self.jobs.start(kind, about, same, work, **bounds)

    def _end_others(self, but: Job) -> bool:
        """Ask all jobs but one to end; whether there are others."""
        others = [job for job in self.jobs.running if job is not but]
        for job in others:
            job.stop()
        return bool(others)


def _count(keys: bytes) -> int:
    count = p.count(keys, 32)
    if not count:
        raise UsageError("name the keys of one chunk at least")
    return count


def _fetching(job: Job) -> peers_protocol.Fetching:
    told = job.told()
    why = "; ".join([told.note, *told.troubles]).strip("; ")
    return peers_protocol.Fetching(job.id, job.state, job.done, job.nbytes, why)
