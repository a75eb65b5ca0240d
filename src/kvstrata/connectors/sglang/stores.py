"""From SGLang's pages into a node's slots: reserve, convert, checksum, commit."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.stats import Tally
from kvstrata.keys import owner_digest
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

NOT_WRITTEN = bytes(16)
KEPT = (p.PRESENT, p.BUSY)
"""Answers that mean: the page is there, or another is just storing it."""


class Stores:
    """Writes pages; SGLang has one thread for it.

    Args:
        names: keys of pages.
        pools: that are cached.
        tally: counts what is stored.
        tenant: as configured.
        patience_s: how long an answer may take.
    """

    def __init__(
        self, names: Names, pools: Pools, tally: Tally, tenant: str, patience_s: float
    ) -> None:
        self._names = names
        self._pools = pools
        self._tally = tally
        self._tenant = tenant
        self._patience_s = patience_s

    def write(
        self,
        client: NodeClient,
        generation: str,
        name: str,
        before: Sequence[str],
        hashes: Sequence[str],
        indices: Sequence[int],
        weights: str,
    ) -> list[bool]:
        """Store pages of a pool; of each whether it is kept now.

        Args:
            generation: of the weights.
            name: of the pool.
            before: SGLang's hashes of the prompt's pages before these.
            hashes: of the pages.
            indices: the first index of each.
            weights: identity of the weights; empty: unknown.
        Raises:
            KVStrataError: the node did not answer as it should, or in time.
        """
        pages, digest = self._pools.get(name), self._names.digest(generation)
        if pages is None or not digest or not hashes:
            return [False] * len(hashes)
        begun, secret = time.perf_counter(), client.hello.secret
        prefix = self._names.keys(secret, digest, [*before, *hashes])
        reserved: p.Reserved = client.reserve(
            digest,
            prefix,
            len(before),
            self._pools.part(name),
            pages.template(self._pools.group(name), "sglang"),
            0.0,
            weights,
            owner_digest(secret, self._tenant, ""),
        ).wait(self._patience_s)
        offsets = offsets_of(reserved.offsets).tolist()
        checksums, written = [NOT_WRITTEN] * len(offsets), 0
        try:
            for i, offset in enumerate(offsets):
                if offset >= 0:
                    payload = client.pool.array(offset + HEADER_BYTES, pages.nbytes)
                    pages.read(indices[i], payload)
                    # The conversion made these bytes, here: nobody meant others.
                    checksums[i] = checksum(payload.data)
                    written += 1
        finally:
            if any(offset >= 0 for offset in offsets):
                client.commit(reserved.reservation, checksums).wait(self._patience_s)
        self._tally.note("backup", written, written * pages.nbytes, time.perf_counter() - begun)
        kept = [offset >= 0 or offset in KEPT for offset in offsets]
        return kept + [False] * (len(hashes) - len(kept))
