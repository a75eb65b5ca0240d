"""Objects stored again with another codec, in the tier that they are in.

What is in the portable order may have been through a lossy codec, so a lossy codec never gets it:
nothing is encoded so twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from kvstrata.errors import KVStrataError, UsageError
from kvstrata.node.coding.choosing import Always, Choice
from kvstrata.node.coding.recoding import NO_CODEC, warm_up
from kvstrata.node.common.changes import Cause
from kvstrata.node.operating.copying import ASK_CHUNKS, AT_ONCE, Copier, Lent, OnWay, taken_in
from kvstrata.node.operating.directory import Directory
from kvstrata.node.operating.jobs import Job
from kvstrata.node.operating.places import Made, Places
from kvstrata.node.service.origin import Origin
from kvstrata.node.service.single import Singly, unreachable
from kvstrata.parts import PERHAPS_LOSSY, identity, order_name
from kvstrata.producers import apart

if TYPE_CHECKING:
    from kvstrata.codecs import Codec

OWN = ""
"""Instead of a codec's name: the tier's own, as it is configured."""


class Transcoder:
    """Stores objects again, for jobs.

    Args:
        places: the tiers.
        copier: takes them out.
        directory: of what owned tiers hold.
        bound: the operator's `quality`; "none": there is no bound.
    """

    def __init__(self, places: Places, copier: Copier, directory: Directory, bound: str) -> None:
        self._places = places
        self._copier = copier
        self._directory = directory
        self._bound = bound

    def check(self, tier: str, keys: bytes | None, made: Made) -> Singly:
        """The tier. Raises `UsageError` where nothing of it can be stored again."""
        backing = self._places.named(tier)
        if backing is None:
            raise UsageError("host memory holds objects raw; name a slower tier")
        if not backing.takes_writes:
            raise UsageError(f"nothing is ever written to {tier}")
        if keys is None:
            self._places.owned_named(tier)
        else:
            made.check_for(backing)
        return backing

    async def choice(self, backing: Singly, codec: str) -> Choice | None:
        """How a codec of this name stores. Raises `UsageError` for one that may not be, by name."""
        if codec == OWN:
            return backing.choice
        choice = await self._copier.do(lambda: ready(codec))
        if choice is not None and not choice.lossless and self._bound != "none":
            raise UsageError(
                f"quality is {self._bound}, and {codec} does not ask what it does to answers; "
                f"with {backing.name}.codec = auto and no codec named, the model's table decides"
            )
        return choice

    async def run(
        self,
        job: Job,
        backing: Singly,
        choice: Choice | None,
        packed: bytes | None,
        made: Made,
    ) -> None:
        """Store these chunks again, or all that an owned tier holds."""
        num_same = 0
        async for key in self._keys(job, backing, packed, made):
            job.check()
            if not backing.readable:
                raise unreachable(backing)
            for part in made.parts or tuple(self._places.parts_of(key, backing.name)):
                num_same += await self._again(job, backing, key, part, choice)
            job.done += 1
            job.note = f"{num_same} objects were stored so already" if num_same else ""

    async def _keys(
        self, job: Job, backing: Singly, packed: bytes | None, made: Made
    ) -> AsyncIterator[bytes]:
        if packed is not None:
            keys = await taken_in(packed)
            job.total = len(keys)
            for start in range(0, len(keys), ASK_CHUNKS):
                await self._places.ask(keys[start : start + ASK_CHUNKS], made, [backing])
                for key in keys[start : start + ASK_CHUNKS]:
                    yield key
            return
        owned = self._places.owned_named(backing.name)
        assert owned is not None
        job.total, after = len(owned.index), b""
        while some := self._directory.after([backing.name], after, AT_ONCE):
            for key in some:
                yield key
            after = some[-1]

    async def _again(
        self, job: Job, backing: Singly, key: bytes, part: int, choice: Choice | None
    ) -> bool:
        """Store one object again; whether it is as it should be already."""
        name, before = identity(key, part).hex(), backing.seen(key, part)
        problem = ""
        try:
            with self._copier.on_way(key) as way:
                async with self._copier.lent(key, part, backing.name) as lent:
                    if lent is None:
                        if before is None:
                            return False
                        problem = "it could not be read"
                    elif _is_so(lent, choice):
                        return True
                    else:
                        problem = await self._store(way, backing, part, lent, choice)
                        job.nbytes += 0 if problem else len(lent.data)
            if not problem and backing.must_be_asked and backing.seen(key, part) != before:
                # Under another name, since its byte order is another one.
                await backing.remove(key, part, before, Cause.LOST)
        except asyncio.CancelledError:
            raise
        except KVStrataError as error:
            problem = str(error)
        if problem:
            job.trouble(f"object {name}: {problem}")
        return False

    async def _store(
        self, way: OnWay, backing: Singly, part: int, lent: Lent, choice: Choice | None
    ) -> str:
        header = lent.header
        if choice is not None and not choice.lossless and lent.stored.kind in PERHAPS_LOSSY:
            return (
                f"it may have been through a lossy codec already, so {choice.name} may not have it"
            )
        if not way.wanted:
            return "it was cleared meanwhile"
        order = order_name(header.kind, header.order)
        origin = Origin([way.key], part, order, lent.cost, "", header.namespace)
        if await backing.put(way.key, lent.data, origin, choice, replaces=True):
            return ""
        return f"{backing.name} has not taken it: {backing.state}"


def ready(name: str) -> Choice | None:
    """A codec by its name, compiled; blocks.

    Raises:
        UsageError: there is none, or it does not work on this machine.
    """
    if name == "raw":
        return None
    try:
        from kvstrata.codecs import codec_named

        codec: Codec = codec_named(name)
        warm_up(codec)
    except NO_CODEC as error:
        raise UsageError(f"the codec {name} does not work here: {error}") from error
    return Always(codec)


def _is_so(lent: Lent, choice: Choice | None) -> bool:
    """Whether an object is stored as this choice would store it, as far as its name says."""
    if choice is None:
        return lent.stored.codec == "raw"
    if not isinstance(choice, Always):
        return False
    return choice.made(lent.stored.codec, apart(lent.stored.codec_parameters)[1])
