"""Prefixes brought into host memory ahead of need, and to another node.

A prefetch is a match of the node's own: what is there is leased, promoted, and let go once it has
come; then it is in host memory as anything that was used just now. All prefetches together lease no
more than one process may.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvstrata.errors import KVStrataError, TierUnavailable, UsageError
from kvstrata.header import NOBODY
from kvstrata.node.operating.copying import Copier, taken_in
from kvstrata.node.operating.explaining import Looked
from kvstrata.node.operating.jobs import Job
from kvstrata.node.operating.places import HOST, Made, Places
from kvstrata.node.service.backing import Question
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.node.slots.leases import Lease, LeaseTable
from kvstrata.parts import order_name
from kvstrata.transfer import peers as peers_protocol
from kvstrata.transfer.tcp import Address
from kvstrata.wire import protocol as p
from kvstrata.wire.namespaces import Described

SEND_CHUNKS = 1024
"""Of what goes to another node so many are held still at once, as far as there is room."""
SLICE = 4096
WATCH_S = 0.1
"""How often another node is asked how far it is."""
NO_MORE = "this node has no more of it"
SILENT_S = 60.0
"""For how long another node may bring nothing, before that counts as a failure."""


class Sought(NamedTuple):
    """What a match needs to know of chunks, given or found out."""

    made: Made
    lengths: tuple[int, ...]
    owner: bytes = NOBODY
    peer: Address | None = None


class Prefetcher:
    """Brings prefixes into host memory, for jobs.

    Args:
        places: the tiers.
        leases: the node's.
        copier: reads the first chunk, to find out what was not said.
        match: of the node, see `Node.match`.
        release: ends a lease.
        describe: what a namespace is made of, by its digest; None: nobody has said.
    """

    def __init__(
        self,
        places: Places,
        leases: LeaseTable,
        copier: Copier,
        match: Callable[[Client, p.Match], p.Matched | Awaitable[p.Matched]],
        release: Callable[[Lease], None],
        describe: Callable[[bytes], Described | None],
    ) -> None:
        self._places = places
        self._leases = leases
        self._copier = copier
        self._match = match
        self._release = release
        self._describe = describe
        self._holder = Holder()

    async def run(self, job: Job, packed: bytes, sought: Sought) -> None:
        """Bring as much of a prefix as there is, and room for."""
        keys = await taken_in(packed)
        job.total = len(keys)
        if sought.peer is None:
            sought = await self.found_out(keys[0], sought)
        async with self.held(job, keys, sought):
            pass
        if job.done < job.total:
            job.note = job.note or self._why(keys[job.done], sought)

    @contextlib.asynccontextmanager
    async def held(self, job: Job, keys: Sequence[bytes], sought: Sought) -> AsyncIterator[int]:
        """Chunks at the beginning, in host memory and leased meanwhile: how many.

        Adds to what the job has done as they come.
        """
        made, peer = sought.made, sought.peer
        if peer is None:
            await job.wait(self._places.ask(keys, made, self._places.backings))
        else:
            # Its word is asked for alone, and waited for: the match would not be patient enough.
            await job.wait(self._ask_peer(keys, sought))
        client = Client(f"job {job.id}", self._holder)
        message = p.Match(
            job.id, b"".join(keys), list(made.parts), list(made.orders), list(sought.lengths),
            sought.owner, made.namespace, peer=str(peer or ""), needs=list(made.needs),
        )  # fmt: skip
        answer = self._match(client, message)
        matched = await answer if isinstance(answer, Awaitable) else answer
        lease = self._leases.get(matched.lease)
        if lease is None:
            if matched.peer_refused:
                raise UsageError(matched.peer_refused)
            yield 0
            return
        before = job.done
        try:
            if matched.peer_refused:
                raise UsageError(matched.peer_refused)
            while not lease.settled(lease.num_chunks - 1):
                await self._next(job, lease)
                job.done = before + lease.ready
            job.done = before + lease.ready
            job.nbytes += await _brought(lease, matched.tiers)
            if lease.failed:
                job.trouble(f"chunk {keys[lease.ready].hex()} could not be brought")
            yield lease.ready
        finally:
            client.ended = True
            self._release(lease)

    async def _next(self, job: Job, lease: Lease) -> None:
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not told.done():
                told.set_result(None)

        lease.listeners.append((partial(lease.settled, lease.ready), tell))
        await job.wait(told)

    async def _ask_peer(self, keys: Sequence[bytes], sought: Sought) -> None:
        assert self._places.peers is not None
        made = sought.made
        question = Question(made.namespace, keys, made.parts, made.orders, sought.peer)
        if made.optional:
            # What their boundary needs the match asks for, once it knows where that is.
            every = tuple(part for part in made.parts if part not in made.optional)
            question = question._replace(parts=every)
        if question.parts:
            await self._places.peers.ask(question)

    async def found_out(self, key: bytes, sought: Sought) -> Sought:
        """What chunks like this one are made of, read off it where it was not said.

        Raises:
            UsageError: no tier of the node's own has it.
        """
        made = sought.made
        if made.parts and made.orders and sought.lengths:
            return sought
        if (told := self._as_told(sought, made.namespace)) is not None:
            return told
        name = next((one for one in self._places.owned if self._places.parts_of(key, one)), None)
        if name is None:
            raise UsageError(
                "the first chunk is in no tier of this node's own; name parts, orders, lengths and "
                "the namespace to have it from elsewhere"
            )
        parts = made.parts or tuple(self._places.parts_of(key, name))
        orders, lengths, namespace = dict.fromkeys(made.orders), list[int](), made.namespace
        for part in parts:
            async with self._copier.lent(key, part, name) as lent:
                if lent is None:
                    raise TierUnavailable(f"{name}: the first chunk could not be read")
                header = lent.header
                lengths.append(header.raw_length)
                if not made.orders:
                    orders[order_name(header.kind, header.order)] = None
                namespace = namespace or header.namespace
            if (told := self._as_told(sought, namespace)) is not None:
                return told
        return sought._replace(
            made=Made(parts, tuple(orders), namespace), lengths=sought.lengths or tuple(lengths)
        )

    def _as_told(self, sought: Sought, namespace: bytes) -> Sought | None:
        """The same as an engine told it, of a model whose first chunk need not have all parts."""
        made, told = sought.made, self._describe(namespace)
        if told is None or not any(told.needs) or made.parts not in ((), tuple(told.objects)):
            return None
        orders = made.orders or tuple(told.orders)
        made = Made(tuple(told.objects), orders, namespace, tuple(told.needs))
        return sought._replace(made=made, lengths=sought.lengths or tuple(told.lengths))

    def _why(self, key: bytes, sought: Sought) -> str:
        """Why a prefetch ended before its last chunk."""
        made, places = sought.made, self._places
        if made.optional:
            return f"nobody has what more of it needs, or {HOST} has no room for that"
        there = all(
            places.host.get(key, part) is not None
            or any(one.find(key, part, made.orders or None) is not None for one in places.backings)
            for part in made.parts
        )
        return f"no room in {HOST} for more of it at once" if there else "nobody has the next chunk"


class Sender:
    """Has another node fetch prefixes from this one, for jobs.

    Args:
        places: the tiers; the peers among them.
        prefetcher: brings what is sent into host memory, where others may read it.
        look: says what of a prompt a match would lease.
        address: where others find this node; empty: nowhere.
    """

    def __init__(
        self,
        places: Places,
        prefetcher: Prefetcher,
        look: Callable[[p.Lookup], Awaitable[Looked]],
        address: Callable[[], str],
    ) -> None:
        self._places = places
        self._prefetcher = prefetcher
        self._look = look
        self._address = address

    def checked(self, peer: str) -> Address:
        """The other node. Raises `UsageError` where it cannot be sent anything, and says why."""
        if self._places.peers is None:
            raise UsageError("this node asks no others: see peer.nodes and peer.named")
        address, why = self._places.peers.named(peer)
        if address is None:
            raise UsageError(why)
        if not self._address():
            raise UsageError("others find this node nowhere: see network.listen and advertise")
        return address

    async def run(self, job: Job, packed: bytes, peer: Address, sought: Sought) -> None:
        """Send as much of a prefix as there is."""
        keys = await taken_in(packed)
        job.total = len(keys)
        sought = await self._prefetcher.found_out(keys[0], sought)
        last = await self._last_portion(job, keys, sought)
        every = _of_every_chunk(sought)
        while job.done < last.stop:
            is_last = job.done >= last.start
            if not (is_last or every.made.parts):
                job.done = last.start  # nothing of what lies before is needed
                continue
            before, nbytes = job.done, job.nbytes
            what, stop = (sought, last.stop) if is_last else (every, last.start)
            if not what.made.optional:
                stop = min(stop, before + SEND_CHUNKS)
            some = keys[before:stop]
            async with self._prefetcher.held(job, some, what) as count:
                job.done, job.nbytes = before, nbytes  # it counts once it is there
                if not count:
                    job.note = NO_MORE
                    return
                await self._have_fetched(job, some[:count], peer, what, before)
            if job.done < before + count:
                return
        job.note = NO_MORE if job.done < job.total else job.note

    async def _last_portion(self, job: Job, keys: list[bytes], sought: Sought) -> range:
        """The chunks of which all parts are sent; before them, what is needed of every chunk.

        Where windows or states are among the parts these are of use at a boundary alone: at the
        longest that this node has, and what that needs of them goes at once.
        """
        made = sought.made
        if not made.optional:
            return range(len(keys))
        lookup = p.Lookup(job.id, b"".join(keys), list(made.parts), list(made.orders),
                          made.namespace)  # fmt: skip
        tiers = (await self._look(lookup)).tiers
        end = tiers.find(p.ABSENT)
        boundary = len(tiers) if end < 0 else end
        return range(max(0, boundary - max(made.needs)), boundary)

    async def _have_fetched(
        self, job: Job, keys: list[bytes], peer: Address, sought: Sought, before: int
    ) -> None:
        assert self._places.peers is not None
        made, tell = sought.made, self._places.peers.tell
        request = peers_protocol.Fetch(
            self._address(), made.namespace, keys, list(made.parts), list(made.orders),
            list(sought.lengths), list(made.needs),
        )  # fmt: skip
        state = await job.wait(tell(peer, request))
        clock, quiet_since = asyncio.get_running_loop().time, 0.0
        while state.state == "running":
            now = clock()
            if before + state.done > job.done or not quiet_since:
                quiet_since = now
            elif now - quiet_since > SILENT_S:
                raise TierUnavailable(f"{peer} has brought nothing for {SILENT_S:g} s")
            job.done = before + state.done
            await job.pause(WATCH_S)
            state = await job.wait(tell(peer, peers_protocol.Watch(state.job)))
        job.done = before + state.done
        job.nbytes += state.nbytes
        if state.done < len(keys):
            raise _refused(peer, state)


def _of_every_chunk(sought: Sought) -> Sought:
    """The same of those parts alone that are needed of every chunk."""
    made, optional = sought.made, sought.made.optional
    parts = tuple(part for part in made.parts if part not in optional)
    each = zip(made.parts, sought.lengths, strict=False)
    lengths = tuple(length for part, length in each if part not in optional)
    return sought._replace(made=made._replace(parts=parts, needs=()), lengths=lengths)


async def _brought(lease: Lease, tiers: bytes) -> int:
    """Bytes of what has come into host memory for a lease."""
    nbytes = 0
    for start in range(0, lease.ready, SLICE):
        rows = lease.rows[start : min(start + SLICE, lease.ready)]
        nbytes += sum(row.nbytes for row, tier in zip(rows, tiers[start:], strict=False) if tier)
        await asyncio.sleep(0)
    return nbytes


def _refused(peer: Address, state: peers_protocol.Fetching) -> KVStrataError:
    return TierUnavailable(
        f"{peer} has {state.done} of what it was sent: {state.why or state.state}"
    )
