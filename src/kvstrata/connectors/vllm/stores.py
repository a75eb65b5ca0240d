"""Stores of one worker: threads that reserve slots, copy blocks into them, and commit.

A step that is about to overwrite blocks waits for the stores that read them, or cancels those that
have not begun to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstrata.connectors.threads import use_given_cores, yield_to_the_engine
from kvstrata.connectors.vllm.copies import Copier, payload_address
from kvstrata.connectors.vllm.fills import fill
from kvstrata.connectors.vllm.messages import Store
from kvstrata.connectors.vllm.payloads import Payloads
from kvstrata.connectors.vllm.stats import Tally
from kvstrata.errors import KVStrataError
from kvstrata.observe.tracing import Tracer, spanning
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

#: stores that may wait for their turn; beyond it they are dropped, loads never are
MAX_WAITING_STORES = 64
NOT_WRITTEN = bytes(16)


class StoreJob:
    """A store on its way.

    Args:
        store: what to copy.
        after: a mark of the copier's; the blocks hold their bytes from then on.
        cost: seconds that computing one chunk took; 0 if unknown.
    """

    def __init__(self, store: Store, after: Any, cost: float) -> None:
        self.store = store
        self.blocks = frozenset(store.blocks)
        self.after = after
        self.cost = cost
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._cancelled = False
        self._copying = False

    def begin_copy(self) -> bool:
        """Whether the blocks may still be read; if so they hold still until `ended` is set."""
        with self._lock:
            self._copying = not self._cancelled
            return self._copying

    @property
    def cancelled(self) -> bool:
        """Whether it will never read its blocks."""
        return self._cancelled

    def settle(self, timeout_s: float) -> bool:
        """Return when the blocks are no longer read; False if the store was cancelled for that.

        The time limit is for a copy to begin. One that has begun is waited for to its end.
        """
        if self.ended.wait(timeout_s):
            return True
        with self._lock:
            if not self._copying:
                self._cancelled = True
                return False
        self.ended.wait()
        return True


class Stores:
    """Copies of this worker's blocks into a node's slots.

    Args:
        payloads: the worker's objects of a chunk, by their part.
        copier: copies between the engine's blocks and the pool.
        world: number of workers.
        patience_s: for each answer of the node, and for a copy to begin that is in the way.
        tally: counts what is stored.
        tracer: of those stores that are traced.
    """

    def __init__(
        self,
        payloads: Mapping[int, Payloads],
        copier: Copier,
        world: int,
        patience_s: float,
        tally: Tally,
        tracer: Tracer | None,
    ) -> None:
        self._payloads = payloads
        self._copier = copier
        self._patience_s = patience_s
        self._tally, self._tracer = tally, tracer
        # Ranks spin while they wait for each other: beside that a thread that yields would starve,
        # and its store be dropped.
        yields = yield_to_the_engine if world == 1 else use_given_cores
        self._storing = ThreadPoolExecutor(1, "kvstrata-store", yields)
        # The engine that decodes waits for these.
        self._lending = ThreadPoolExecutor(1, "kvstrata-lend", use_given_cores)
        self._jobs: list[StoreJob] = []

    def begin(self, store: Store, client: NodeClient, cost: float) -> None:
        """Begin a store of blocks that the engine has filled, unless too many are waiting."""
        self._jobs = [job for job in self._jobs if not job.ended.is_set()]
        mine = [one for one in self._payloads.values() if one.stores and one.table == store.group]
        if len(self._jobs) + len(mine) > MAX_WAITING_STORES * len(self._payloads):
            self._tally.add("stores_dropped_total", 1, "too many wait")
            return
        after = self._copier.mark()
        threads = self._lending if store.lend else self._storing
        for payloads in mine:
            job = StoreJob(store, after, cost)
            self._jobs.append(job)
            threads.submit(self._store, job, payloads, client)

    def fence(self, blocks: set[int] | None = None) -> None:
        """Return when no store reads these blocks any more (None: no block at all)."""
        deadline = time.monotonic() + self._patience_s
        for job in self._jobs:
            if job.cancelled or (blocks is not None and job.blocks.isdisjoint(blocks)):
                continue
            if not job.settle(max(0.0, deadline - time.monotonic())):
                logger.warning("KVStrata: a store was dropped, its blocks are needed")
                self._tally.add("stores_dropped_total", 1, "its blocks are needed")

    def settle(self) -> None:
        """Return when no copy is under way; what has not begun is dropped."""
        for job in self._jobs:
            job.settle(0.0)

    def close(self) -> None:
        """End the threads, and what they do. Repeatable."""
        for threads in (self._storing, self._lending):
            threads.shutdown(wait=True)

    def _store(self, job: StoreJob, payloads: Payloads, client: NodeClient) -> None:
        """One store of one of the worker's objects, from reservation to commit; never raises."""
        try:
            with spanning(self._tracer, "kvstrata.store", job.store.trace) as trace:
                self._store_chunks(job, payloads, client, trace)
        except KVStrataError as error:
            logger.warning("KVStrata: a store was dropped: %s", error)
            self._tally.add("stores_dropped_total", 1, "the node failed it")
        except Exception:
            logger.exception("KVStrata: a store died of a bug")
            self._tally.add("stores_dropped_total", 1, "a bug")
        finally:
            job.ended.set()

    def _store_chunks(
        self, job: StoreJob, payloads: Payloads, client: NodeClient, trace: str
    ) -> None:
        store, patience = job.store, self._patience_s
        reserved: p.Reserved = client.reserve(
            store.namespace,
            store.prefix,
            store.first,
            payloads.part,
            payloads.template_of(store),
            job.cost,
            store.weights,
            store.owner,
            store.lend,
            trace,
            store.priority,
            store.tiers,
            store.marks,
        ).wait(patience)
        offsets = offsets_of(reserved.offsets)
        given = [i for i, offset in enumerate(offsets) if offset >= 0]
        checksums = [NOT_WRITTEN] * len(offsets)
        per_chunk = len(store.blocks) // len(offsets)
        try:
            if given and job.begin_copy():
                blocks = [b for i in given for b in store.blocks[i * per_chunk :][:per_chunk]]
                addresses = [payload_address(client.pool, offsets[i]) for i in given]
                sums = fill(self._copier, payloads, store.tail_tokens, addresses, blocks,
                            job.after, job.ended)  # fmt: skip
                for i, checksum in zip(given, sums, strict=True):
                    checksums[i] = checksum
        finally:
            if given:
                done: p.Done = client.commit(reserved.reservation, checksums).wait(patience)
                stored = done.count * payloads.template.raw_length
                self._tally.add("stored_bytes_total", stored)
