"""What a node has of a prompt: one match, whose lease brings it to host memory and keeps it there.

So what lies in a slower tier is on its way while the request still waits for its turn, and the one
thread in which SGLang reads finds slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.pages import KV
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.errors import KVStrataError
from kvstrata.keys import owner_digest
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of


class Wanted(NamedTuple):
    """What a boundary needs of a pool.

    Args:
        name: SGLang's name of it.
        last: pages before the boundary; 0: all of the prompt's.
    """

    name: str
    last: int = 0


class Lookups:
    """Asks the node; from whichever thread.

    Args:
        names: keys of pages.
        pools: that are cached.
        holds: takes the leases.
        tenant: as configured.
        patience_s: how long an answer may take.
    """

    def __init__(
        self, names: Names, pools: Pools, holds: Holds, tenant: str, patience_s: float
    ) -> None:
        self._names = names
        self._pools = pools
        self._holds = holds
        self._tenant = tenant
        self._patience_s = patience_s

    def prefix(
        self,
        client: NodeClient,
        generation: str,
        hashes: Sequence[str],
        before: Sequence[str],
        wanted: Sequence[Wanted] = (Wanted(KV),),
    ) -> int:
        """How many leading pages can be had, and hold them; 0: none.

        Args:
            generation: of the weights.
            hashes: SGLang's, of the pages that follow ``before``.
            before: those that SGLang has itself.
            wanted: what a boundary needs.
        Raises:
            KVStrataError: the node did not answer as it should, or in time.
        """
        found = 0
        for secret in client.hello.secrets:
            if (hold := self._match(client, generation, secret, hashes, before, wanted)) is None:
                continue
            if len(hold.hashes) > found or (not found and secret == client.hello.secret):
                found = len(hold.hashes)
                self._holds.add(hold)
            else:
                client.release(hold.lease)
            if found == len(hashes):
                break
        return found

    def restorable(
        self,
        client: NodeClient,
        generation: str,
        hashes: Sequence[str],
        wanted: Sequence[Wanted],
    ) -> list[int]:
        """Every number of leading pages that can be gone on from.

        Args:
            generation, wanted: as of `prefix`.
            hashes: of pages whose ``kv`` is there.
        Raises:
            KVStrataError: as `prefix`.
        """
        digest = self._names.digest(generation)
        good = set(range(1, len(hashes) + 1))
        keys = self._names.keys(client.hello.secret, digest, hashes)
        for one in wanted:
            pages, part = self._pools.get(one.name), self._pools.part(one.name)
            if pages is None or one.name == KV:
                continue
            tiers = client.lookup(keys, [part], pages.orders, digest, self._patience_s)
            run, there = 0, []
            for tier in tiers:
                run = run + 1 if tier != p.ABSENT else 0
                there.append(run)
            good &= {n for n, run in enumerate(there, 1) if run >= min(n, one.last or n)}
        return sorted(good)

    def one(
        self, client: NodeClient, generation: str, hashes: Sequence[str], name: str
    ) -> Hold | None:
        """A lease on these pages of a pool, which nobody has asked for before; None: none is there.

        Raises:
            KVStrataError: as `prefix`.
        """
        best: Hold | None = None
        for secret in client.hello.secrets:
            try:
                hold = self._match(client, generation, secret, hashes, (), [Wanted(name)])
            except KVStrataError:
                if best is None:
                    raise
                break  # what is leased already is there to be read
            if hold is None:
                continue
            if best is None or len(hold.hashes) > len(best.hashes):
                best, hold = hold, best
            if hold is not None:
                client.release(hold.lease)
            if len(best.hashes) == len(hashes):
                break
        return best

    def _match(
        self,
        client: NodeClient,
        generation: str,
        secret: bytes,
        hashes: Sequence[str],
        before: Sequence[str],
        wanted: Sequence[Wanted],
    ) -> Hold | None:
        digest = self._names.digest(generation)
        if not digest or not hashes:
            return None
        keys = self._names.keys(secret, digest, hashes)
        first = self._names.keys(secret, digest, before[:1])[0] if before else keys[0]
        parts = [self._pools.part(one.name) for one in wanted]
        kinds = [pages for one in wanted if (pages := self._pools.get(one.name)) is not None]
        orders = list(dict.fromkeys(order for pages in kinds for order in pages.orders))
        answer: p.Matched = client.match(
            keys,
            parts,
            orders,
            [pages.nbytes for pages in kinds],
            owner_digest(secret, self._tenant, ""),
            digest,
            needs=[one.last for one in wanted] if any(one.last for one in wanted) else (),
        ).wait(self._patience_s)
        count = len(answer.tiers)
        return Hold(
            client=client,
            lease=answer.lease,
            generation=generation,
            hashes=list(hashes[:count]),
            keys=keys[:count],
            parts=parts,
            offsets=offsets_of(answer.offsets).tolist(),
            tiers=answer.tiers,
            first=first,
            before=len(before),
            asked=len(hashes),
            why=answer.why,
        )
