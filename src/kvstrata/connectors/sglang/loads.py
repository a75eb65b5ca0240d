"""From slots into SGLang's pages, as they arrive, and never for longer than SGLang waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.lookups import Lookups
from kvstrata.connectors.sglang.pages import Pages
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.stats import Tally
from kvstrata.errors import CorruptObject, KVStrataError
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.producers import origin
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient

logger = logging.getLogger(__name__)

#: SGLang's own limit on a prefetch begins with a second, and adds a quarter for 1,024 tokens. What
#: it gives up on is lost, so a read ends before that with what has come.
BASE_S, EACH_1024_TOKENS_S = 0.75, 0.2
#: a flush waits for the reading thread for ten seconds, and raises after that
MOST_S = 8.0


def patience_s(num_tokens: int, most_s: float) -> float:
    """How long a read of so many tokens may take.

    Args:
        most_s: the operator's limit, ``deadlines.load``.
    """
    return min(most_s, MOST_S, BASE_S + EACH_1024_TOKENS_S * num_tokens / 1024)


class Loads:
    """Reads pages; SGLang has one thread for it.

    Args:
        pools: that are cached.
        lookups: asks for what nobody holds.
        holds: leases that a lookup took before.
        tally: counts what is loaded.
        most_s: as of `patience_s`.
    """

    def __init__(
        self, pools: Pools, lookups: Lookups, holds: Holds, tally: Tally, most_s: float
    ) -> None:
        self._pools = pools
        self._lookups = lookups
        self._holds = holds
        self._tally = tally
        self._most_s = most_s

    def read(
        self,
        client: NodeClient,
        generation: str,
        name: str,
        hashes: Sequence[str],
        indices: Sequence[int],
    ) -> int:
        """Fill pages of a pool; how many leading ones were filled.

        Whatever goes wrong with a page ends them there; those before it are kept.

        Args:
            generation: of the weights.
            name: of the pool.
            hashes: SGLang's, of the pages.
            indices: the first index of each.
        """
        pages, part = self._pools.get(name), self._pools.part(name)
        if pages is None or not hashes:
            return 0
        deadline = time.monotonic() + patience_s(
            len(hashes) * self._pools.page_tokens, self._most_s
        )
        begun, done = time.perf_counter(), 0
        while done < len(hashes):
            hold = self._holds.take(hashes[done], part, generation)
            if hold is None:
                if time.monotonic() >= deadline:
                    break
                try:
                    hold = self._lookups.one(client, generation, hashes[done:], name)
                except KVStrataError as error:
                    logger.info("KVStrata: a miss: %s", error)
                if hold is None:
                    break
                if not hold.hashes:
                    self._holds.add(hold)  # for its record
                    break
                hold.busy = True
                self._holds.add(hold)
            came = self._read(hold, pages, part, hashes[done:], indices[done:], deadline)
            done += came
            if not came or hold.failed >= 0:
                break
        seconds = time.perf_counter() - begun
        self._tally.note("prefetch", done, done * pages.nbytes, seconds)
        return done

    def _read(
        self,
        hold: Hold,
        pages: Pages,
        part: int,
        hashes: Sequence[str],
        indices: Sequence[int],
        deadline: float,
    ) -> int:
        """Read what a hold has of these pages, from the first one on; give the hold back."""
        begun, start = time.perf_counter(), hold.at[hashes[0]]
        count, failed = 0, True
        try:
            for page, index in zip(hashes, indices, strict=True):
                number = start + count
                if number >= len(hold.hashes) or hold.hashes[number] != page:
                    failed = False
                    break
                try:
                    if hold.offset(number, part) < 0:
                        self._arrive(hold, number, deadline)
                    if hold.offset(number, part) < 0:
                        break  # too late, or not needed at the boundary that was found
                    self._copy(hold, pages, part, number, index)
                except KVStrataError as error:
                    logger.info("KVStrata: a miss from page %d on: %s", number, error)
                    break
                count += 1
            else:
                failed = False
        finally:
            ended = start + count == len(hold.hashes)
            if ended:
                hold.unread.discard(part)
            elif failed:
                hold.failed = start + count
            if part & 0xFFFF0000 == 0:
                hold.loaded.update(range(start, start + count))
            hold.load_s += time.perf_counter() - begun
            self._holds.leave(hold, done=not hold.unread or hold.failed >= 0)
        return count

    def _arrive(self, hold: Hold, number: int, deadline: float) -> None:
        """Wait until a page has come into host memory, as long as there is time.

        Raises:
            KVStrataError: it has not, or the node has gone.
        """
        left = deadline - time.monotonic()
        if hold.offset(number, hold.parts[0]) != p.NEEDLESS and left > 0:
            arrived: p.Arrived = hold.client.await_arrival(hold.lease, number).wait(left)
            hold.arrived(number, arrived.offsets)

    def _copy(self, hold: Hold, pages: Pages, part: int, number: int, index: int) -> None:
        """One object into one page.

        Raises:
            CorruptObject: a slot holds something else than what was leased.
        """
        pool, offset = hold.client.pool, hold.offset(number, part)
        header = decode(pool.view(offset, HEADER_BYTES))
        if header.key != hold.keys[number] or header.group << 16 | header.rank != part:
            raise CorruptObject("a slot holds another object than the one that was leased")
        if not pages.fits(header):
            raise CorruptObject(
                f"a payload of {header.dtype} {header.shape}, order {header.order!r}, codec "
                f"{header.codec!r}; not {pages.dtype} {pages.shape}"
            )
        payload = pool.array(offset + HEADER_BYTES, header.raw_length)
        pages.write(index, payload, header.order)
        if header.group == 0:
            hold.origins[number] = origin(header)
