"""From a model's cache into a node's slots, behind the model's back: nobody waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from kvstrata.connectors.attachment import Attachment
from kvstrata.connectors.threads import yield_to_the_engine
from kvstrata.connectors.transformers.contents import Taken
from kvstrata.connectors.transformers.kinds import Kind
from kvstrata.connectors.transformers.tally import Tally
from kvstrata.errors import KVStrataError
from kvstrata.keys import Namespace, owner_digest
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.pagekeys import chain_of
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.protocol import MAX_RESERVED

logger = logging.getLogger(__name__)

MAX_PENDING = 4
"""Caches that wait to be stored, and take memory meanwhile; further ones are not stored."""
NOT_WRITTEN = bytes(16)


class Left(NamedTuple):
    """What a call leaves to be stored.

    Args:
        namespace: of the model that computed it.
        taken: out of its cache.
        weights: identity of the weights' files; empty: unknown.
    """

    namespace: Namespace
    taken: Taken
    weights: str


class Stores:
    """Stores what calls have left, on one thread.

    Args:
        attachment: to the node.
        tally: counts what is stored.
        tenant: as configured.
        patience_s: how long an answer may take.
    """

    def __init__(
        self, attachment: Attachment, tally: Tally, tenant: str, patience_s: float
    ) -> None:
        self._attachment = attachment
        self._tally = tally
        self._tenant = tenant
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1, "kvstrata-store", initializer=yield_to_the_engine)
        self._pending: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def add(self, left: Left) -> None:
        """Store it soon, unless too much waits already; does not block."""
        self.submit(lambda client: self._write(client, left))

    def submit(self, write: Callable[[NodeClient], None]) -> None:
        """Have something written to a node soon, unless too much waits; does not block."""
        with self._lock:
            if self._closed or len(self._pending) >= MAX_PENDING:
                self._tally.add(skipped_stores=1)
                return
            future = self._thread.submit(self._store, write)
            self._pending.add(future)
        future.add_done_callback(self._done)

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was left so far is stored, or is not going to be; whether it came so."""
        with self._lock:
            pending = set(self._pending)
        return not wait(pending, timeout_s).not_done

    def close(self) -> None:
        """Store what waits, and take no more. Repeatable."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _store(self, write: Callable[[NodeClient], None]) -> None:
        try:
            with self._attachment.client() as client:
                if client is None:
                    self._tally.note("errors", "no node to store to")
                    return
                write(client)
        except KVStrataError as error:
            logger.warning("KVStrata: a store was dropped: %s", error)
            self._tally.note("errors", "a store was dropped")
        except Exception:
            logger.exception("KVStrata: a store died of a bug")
            self._tally.note("errors", "a bug")

    def _write(self, client: NodeClient, left: Left) -> None:
        taken, secret = left.taken, client.hello.secret
        size = taken.kinds.chunk_tokens
        digest, pages = left.namespace.digest(), left.namespace.pages
        chain = chain_of(secret, digest, size, pages=pages)
        keys = chain.keys(taken.tokens[: taken.num_chunks * size])
        for first in range(taken.first, len(keys), MAX_RESERVED):
            some = keys[: first + MAX_RESERVED]
            # Full attention first: without it the others are of no use.
            counts = [
                self._write_kind(client, left, kind, some, first) for kind in taken.kinds.each
            ]
            self._tally.add(stored_chunks=counts[0])

    @torch.no_grad()
    def _write_kind(
        self, client: NodeClient, left: Left, kind: Kind, keys: Sequence[bytes], first: int
    ) -> int:
        """Objects of one kind; how many were written."""
        reserved = client.reserve(
            left.namespace.digest(),
            keys,
            first,
            kind.part,
            kind.template(),
            0.0,
            left.weights,
            owner_digest(client.hello.secret, self._tenant, ""),
        ).wait(self._patience_s)
        offsets = offsets_of(reserved.offsets).tolist()
        checksums, written = [NOT_WRITTEN] * len(offsets), 0
        try:
            for i, offset in enumerate(offsets):
                if offset >= 0:
                    payload = client.pool.array(offset + HEADER_BYTES, kind.nbytes)
                    left.taken.get(kind, first + i, payload)
                    checksums[i] = checksum(payload.data)
                    written += 1
        finally:
            if any(offset >= 0 for offset in offsets):
                client.commit(reserved.reservation, checksums).wait(self._patience_s)
        return written
