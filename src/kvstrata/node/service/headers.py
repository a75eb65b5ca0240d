"""Headers of what an earlier process left in a tier, read in the background, the last used first.

A scan reads names only, and what begins like a prompt is found by the marks in headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from functools import partial

from kvstrata.errors import CorruptObject, Incompatible
from kvstrata.header import ObjectHeader
from kvstrata.node.common.index import Index
from kvstrata.node.service.calls import TierCalls
from kvstrata.objects import decode
from kvstrata.parts import identity
from kvstrata.producers import apart
from kvstrata.tiers.base import Outcome, OwnedTier
from kvstrata.tiers.marks import Marks, Whose

BATCH = 32


class Headers:
    """Reads the headers of one tier: what prompts have in common with it, and whose it is.

    Args:
        index: of the tier.
        tier: where they are.
        calls: into the tier.
        marks: what of it counts as cleared.
    """

    def __init__(self, index: Index[int], tier: OwnedTier, calls: TierCalls, marks: Marks) -> None:
        self._index = index
        self._tier = tier
        self._calls = calls
        self._marks = marks

    async def read(
        self,
        keys: list[bytes],
        lacks: Callable[[bytes], bool],
        learn: Callable[[bytes, int, ObjectHeader], None],
    ) -> None:
        """Read one header of each chunk, in half of the time at most.

        Args:
            keys: of the chunks, the first one last; what has been read has left the list.
            lacks: whether a chunk's header is of use.
            learn: is told of each object's.

        Raises:
            TierUnavailable: it cannot be read; those that were asked for have left the list.
        """
        while keys:
            some, keys[-BATCH:] = keys[: -BATCH - 1 : -1], []
            parts = [(key, part) for key in some if lacks(key)
                     for part, _ in itertools.islice(self._index.objects(key), 1)]  # fmt: skip
            begun = time.monotonic()
            if parts:
                ids = [identity(*name) for name in parts]
                found = await self._calls.call("header", partial(self._headers, ids))
                for (key, part), header in zip(parts, found, strict=True):
                    there = self._index.get(key, part) is not None
                    if header is not None and there and lacks(key):
                        learn(key, part, header)
            await asyncio.sleep(time.monotonic() - begun)

    async def codecs(self) -> set[tuple[str, bytes]]:
        """What the objects of the last chunks are encoded with: family and parameters.

        Raises:
            TierUnavailable: they cannot be read.
        """
        keys = self._index.latest(BATCH)
        ids = [identity(key, part) for key in keys for part, _ in self._index.objects(key)]
        if not ids:
            return set()
        headers = await self._calls.call("header", partial(self._headers, ids[:BATCH]))
        known = [header for header in headers if header is not None and header.codec != "raw"]
        return {(header.codec, apart(header.codec_parameters)[1]) for header in known}

    def _headers(self, ids: list[bytes]) -> list[ObjectHeader | None]:
        """In a thread: of each object, unless it is none that could be served."""
        pages = self._tier.headers(ids)
        return [self._header(*one) for one in zip(ids, pages, strict=True)]

    def _header(self, object_id: bytes, page: bytes | Outcome) -> ObjectHeader | None:
        if not isinstance(page, Outcome):
            with contextlib.suppress(CorruptObject, Incompatible):  # whoever reads it all says so
                header = decode(page)
                whose = Whose(header.owner, header.namespace)
                covered = self._marks.covers(whose, header.created_ns)
                return header if header.object_id == object_id and not covered else None
        return None
