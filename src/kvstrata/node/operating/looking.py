"""What an operator sees of what is held: one object's header, chunks in pages, and a scrub."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.node.common.background import Threads
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.operating.directory import Directory
from kvstrata.node.operating.jobs import Job
from kvstrata.node.operating.lineage import Lineage
from kvstrata.node.operating.places import HOST, Made, Places
from kvstrata.node.service.entries import size_of
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.single import Seen, unreachable
from kvstrata.objects import HEADER_BYTES, decode, verify_object
from kvstrata.parts import identity
from kvstrata.tiers.marks import UNKNOWN
from kvstrata.wire import operating as o

MAX_PAGE = 1000
SLICE = 32
AT_ONCE = 4
"""Objects that one scrub reads at once, so that whoever waits for the tier is not behind many."""


class Looker:
    """Looks at what is held; changes nothing, but for a scrub that takes out what is corrupt.

    Args:
        places: the tiers.
        threads: read host memory.
        directory: of what owned tiers hold.
        lineage: of what passed through host memory.
    """

    def __init__(
        self, places: Places, threads: Threads, directory: Directory, lineage: Lineage
    ) -> None:
        self._places = places
        self._threads = threads
        self._directory = directory
        self._lineage = lineage

    async def inspect(self, message: o.Inspect) -> o.Inspected:
        """One object's header and whether the object is whole.

        Raises:
            UsageError: there is no such tier, or it has to be told more to be asked.
            TierUnavailable: it cannot be asked now.
        """
        backing = self._places.named(message.tier)
        if len(message.key) != 32:
            raise UsageError(f"a key of {len(message.key)} bytes, not 32")
        made = Made.checked([message.part], message.orders, message.namespace)
        if backing is None:
            seen = await self._look_in_host(message.key, message.part)
        else:
            made.check_for(backing)
            if not backing.readable:
                raise unreachable(backing)
            await self._places.ask([message.key], made, [backing])
            seen = await backing.look(message.key, message.part)
        header = {} if seen.header is None else fields(seen.header)
        return o.Inspected(message.id, seen.nbytes, seen.problem, header)

    def list(self, message: o.List) -> o.Listed | Awaitable[o.Listed]:
        """The chunks with the next higher keys."""
        return in_slices(self._list(message))

    def _list(self, message: o.List) -> Work[o.Listed]:
        if message.tier:
            self._places.owned_named(message.tier)
        tiers = [message.tier] if message.tier else self._places.owned
        most = max(1, min(message.limit, MAX_PAGE))
        keys = self._directory.after(tiers, message.after, most)
        chunks: list[o.Chunk] = []
        for start in range(0, len(keys), SLICE):
            if start:
                yield None
            some = [self._chunk(key) for key in keys[start : start + SLICE]]
            chunks += [one for one in some if one.tiers]  # it may have gone since the last slice
        return o.Listed(message.id, chunks, keys[-1] if len(keys) == most else b"")

    async def scrub(self, job: Job, tier: str) -> None:
        """Verify all that a tier of the node's own holds, now; what is corrupt is taken out."""
        backing = self._places.owned_named(tier)
        index = self._places.host.index if backing is None else backing.index
        job.total, after = index.num_objects, b""
        while keys := self._directory.after([tier], after, AT_ONCE):
            job.check()
            if backing is not None and not backing.readable:
                raise unreachable(backing)
            names = [(key, part) for key in keys for part, _ in index.objects(key)]
            for start in range(0, len(names), AT_ONCE):
                some = names[start : start + AT_ONCE]
                await asyncio.gather(*[self._verify(job, backing, *name) for name in some])
            after = keys[-1]
        job.total = job.done

    async def _verify(self, job: Job, backing: OwnedBacking | None, key: bytes, part: int) -> None:
        if backing is None:
            slot = self._places.host.get(key, part)
            seen = await self._look_in_host(key, part)
            nbytes = seen.nbytes
            good = not seen.problem or self._places.host.get(key, part) is not slot
            if slot is not None and not good:
                self._places.host.drop_object(key, part, Cause.CORRUPT)
        else:
            nbytes = backing.find(key, part, None) or 0
            good = not nbytes or await backing.verify(key, part, nbytes) is not False
        job.done += 1
        job.nbytes += nbytes
        if nbytes and not good:
            job.trouble(f"object {identity(key, part).hex()} is not whole, and out of service")

    async def _look_in_host(self, key: bytes, part: int) -> Seen:
        host = self._places.host
        slot = host.get(key, part)
        if slot is None:
            return Seen(0, None, "it is not there")
        view = host.pool.view(slot.offset, slot.nbytes)

        def work() -> Seen:
            header: ObjectHeader | None = None
            try:
                header = decode(view[:HEADER_BYTES])
                verify_object(view, identity(key, part))
            except (CorruptObject, Incompatible) as error:
                return Seen(slot.nbytes, header, str(error))
            return Seen(slot.nbytes, header, "")

        host.hold(slot)
        try:
            return await asyncio.wrap_future(self._threads.submit(work))
        finally:
            host.unhold(slot)

    def _chunk(self, key: bytes) -> o.Chunk:
        kinship, used = self._lineage.of(key)
        host = self._places.host.index
        tiers = {HOST: sum(slot.nbytes for _, slot in host.objects(key))}
        whose = host.whose(key)
        for one in self._places.backings:
            if isinstance(one, OwnedBacking):
                tiers[one.name] = sum(size_of(entry) for _, entry in one.index.objects(key))
                whose = one.index.whose(key) if whose == UNKNOWN else whose
        return o.Chunk(
            key,
            {name: nbytes for name, nbytes in tiers.items() if nbytes},
            kinship.parent,
            kinship.start,
            kinship.num_tokens,
            whose.namespace,
            whose.owner,
            used,
        )


def fields(header: ObjectHeader) -> dict[str, Any]:
    """A header for people: every field by its name, bytes in hex."""
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in msgspec.structs.asdict(header).items()
    }
