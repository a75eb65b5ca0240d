"""The connector in a vLLM worker: copies between the node's slots and the engine's blocks.

Loads and stores run in threads of their own. The engine's main thread waits for them in two
places only: before a step that overwrites blocks a store still reads, and, on the CPU, inside a
forward that a synchronous load feeds.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kvstrata.client import NodeClient, offsets_of
from kvstrata.config import Config
from kvstrata.connectors.vllm.copies import Copier, Plan, make_copier, payload_address
from kvstrata.connectors.vllm.link import Link
from kvstrata.connectors.vllm.messages import Load, StepMetadata, Store, WorkerHello, WorkerReport
from kvstrata.connectors.vllm.pages import Pages, attention_layers, describe, self_test
from kvstrata.errors import CorruptObject, DeadlineExceeded, KVStrataError
from kvstrata.node import protocol as p
from kvstrata.objects import HEADER_BYTES, checksum, decode

logger = logging.getLogger(__name__)

NUM_LOAD_THREADS = 2
#: stores that may wait for their turn; beyond it they are dropped, loads never are
MAX_WAITING_STORES = 64
#: how long a step without a forward waits for a load to end
EMPTY_STEP_WAIT_S = 0.002
NOT_WRITTEN = bytes(16)


@dataclass(eq=False)
class StoreJob:
    """A store on its way. A step that overwrites its blocks waits for it, or cancels it."""

    store: Store
    blocks: frozenset[int]
    after: Any
    cost: float

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._copying = False
        self.ended = threading.Event()

    def begin_copy(self) -> bool:
        """Whether the blocks may still be read; from now on they hold still."""
        with self._lock:
            self._copying = not self._cancelled
            return self._copying

    def settle(self, timeout_s: float) -> bool:
        """Return when the blocks are no longer needed; False if the store had to be dropped.

        A copy that has started is waited for, however long it takes.
        """
        if self.ended.wait(timeout_s):
            return True
        with self._lock:
            if not self._copying:
                self._cancelled = True
                return False
        self.ended.wait()
        return True


class WorkerSide:
    """Does what the scheduler's side planned; lives in a worker's process.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: the engine's KV cache groups.
        config: KVStrata's.
        chunk_tokens: tokens of a chunk, a whole number of blocks.
    """

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: Config, chunk_tokens: int
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._chunk = chunk_tokens
        self._rank: int = vllm_config.parallel_config.rank
        self._world: int = vllm_config.parallel_config.world_size
        self._link = Link(config, f"worker of rank {self._rank}")
        self._link.start()
        self._client: NodeClient | None = None
        self._problem = ""
        self._pages: Pages | None = None
        self._copier: Copier | None = None
        self._template: p.Template | None = None
        self._layer_numbers: dict[str, int] = {}
        self._loading = ThreadPoolExecutor(NUM_LOAD_THREADS, "kvstrata-load", _use_all_cores)
        self._storing = ThreadPoolExecutor(1, "kvstrata-store", _use_all_cores)
        self._jobs: list[StoreJob] = []
        self._num_dropped = 0
        # loads that have ended since the last report
        self._changed = threading.Condition()
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._num_loading = 0
        # this step's
        self._meta = StepMetadata()
        self._sync_runs: list[list[tuple[list[int], list[int], list[int]]]] = []
        self._sync_kept: list[object] = []
        self._sync_loaded: dict[str, int] = {}
        self._step_began = 0.0

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Learn where the engine's blocks are, and prove that their bytes are understood."""
        try:
            pages = describe(kv_caches, self._vllm_config, self._kv_cache_config)
            if pages.group.kind != "full":
                raise CorruptObject("only full attention is cached so far")
            if self._chunk % pages.block_tokens:
                raise CorruptObject(
                    f"chunk_tokens {self._chunk} is no multiple of blocks of {pages.block_tokens}"
                )
            self_test(pages, kv_caches, attention_layers(pages, self._vllm_config))
        except KVStrataError as error:
            self._problem = str(error)
            return
        self._pages = pages
        self._copier = make_copier(pages.device)
        self._layer_numbers = {name: i for i, name in enumerate(pages.layer_names)}
        per_chunk = self._chunk // pages.block_tokens
        layers = len(pages.layer_names)
        self._template = p.Template(
            kind="native",
            order=pages.order.name,
            dtype=pages.group.dtype,
            shape=list(pages.native_shape(self._chunk)),
            num_tokens=self._chunk,
            raw_length=layers * per_chunk * pages.page_bytes,
        )
        self._link.wait(self._config.deadlines.attach)
        self._attach()

    def hello(self) -> WorkerHello:
        """What the scheduler's side must know."""
        if self._pages is None:
            return WorkerHello(problem=self._problem or "no KV cache was registered")
        group = self._pages.group
        return WorkerHello(
            order=self._pages.order.name,
            layout=(
                f"{group.kind} {group.num_layers} layers, {group.states} states, "
                f"{group.num_kv_heads} heads of {group.head_dim}, {group.dtype}"
            ),
            node=self._node,
        )

    # called by vLLM's model runner, in this order in each step

    def before_step(self, meta: StepMetadata) -> None:
        """Nothing that this step overwrites may still be read by a store."""
        self._step_began = time.monotonic()
        self._follow(meta.node)
        for store in meta.late_stores:
            self._begin_store(store, 0.0)
        overwritten = set(meta.fresh_blocks)
        for load in (*meta.sync_loads, *meta.async_loads):
            overwritten.update(load.blocks)
        self._jobs = [job for job in self._jobs if not job.ended.is_set()]
        deadline = time.monotonic() + self._config.deadlines.request
        for job in self._jobs:
            if not job.blocks.isdisjoint(overwritten) and not job.settle(
                max(0.0, deadline - time.monotonic())
            ):
                self._num_dropped += 1
                logger.warning("KVStrata: a store was dropped, its blocks are needed")

    def bind(self, meta: StepMetadata) -> None:
        """Begin this step's loads."""
        self._meta = meta
        self._sync_runs = []
        for load in meta.async_loads:
            with self._changed:
                self._num_loading += 1
            self._loading.submit(self._load, load, self._client, meta.node)

    def load_sync(self) -> None:
        """Prepare the copies that this forward needs; on a GPU, do them."""
        client = self._client
        for load in self._meta.sync_loads:
            assert self._pages is not None and self._copier is not None
            # The scheduler's side saw to it that this worker has the pool that holds the lease.
            assert client is not None and client.hello.node == self._meta.node
            payloads = [
                self._payload(client, offsets[self._rank], key)
                for offsets, key in zip(load.offsets, load.keys, strict=True)
            ]
            plan = Plan(self._pages, [address for address, _ in payloads], load.blocks)
            self._sync_kept.extend(kept for _, kept in payloads)
            if self._pages.device.type == "cpu":
                self._sync_runs.append([plan.runs(i) for i in range(len(self._layer_numbers))])
            else:
                self._copier.load(plan)

    def load_layer(self, layer_name: str) -> None:
        """Copy one layer of the synchronous loads, just before attention reads it."""
        if self._sync_runs:
            number = self._layer_numbers.get(layer_name)
            if number is not None:
                for runs in self._sync_runs:
                    copy_in(*runs[number])

    def after_forward(self) -> None:
        """Begin this step's stores."""
        meta = self._meta
        for load in meta.sync_loads:
            self._sync_loaded[load.request_id] = 1
        self._sync_runs = []
        self._sync_kept.clear()
        if meta.stores:
            elapsed = time.monotonic() - self._step_began
            cost = elapsed * self._chunk / max(meta.num_tokens, self._chunk)
            for store in meta.stores:
                self._begin_store(store, cost)

    def loads_ended(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended since the last call, and those of them that failed."""
        with self._changed:
            if not self._meta.num_tokens and self._num_loading and not self._loaded:
                self._changed.wait(EMPTY_STEP_WAIT_S)
            loaded, self._loaded = self._loaded, set()
            failed, self._failed = self._failed, set()
        return loaded, failed

    def report(self) -> WorkerReport:
        """What the scheduler's side wants to hear after each step."""
        loaded, self._sync_loaded = self._sync_loaded, {}
        return WorkerReport({self._node}, loaded)

    def close(self) -> None:
        """End what is under way and let go of the node. Repeatable."""
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._storing.shutdown(wait=True)
        self._link.close()
        self._detach()

    # how

    @property
    def _node(self) -> bytes:
        return self._client.hello.node if self._client is not None else b""

    def _follow(self, node: bytes) -> None:
        """Stay with the scheduler's node: leave a dead one's memory before joining the next."""
        if self._pages is None:
            return
        client = self._client
        if client is not None and client.hello.node != node and not client.alive:
            self._detach()
        elif client is not None and client.hello.node != node and node:
            self._detach()
        if self._client is None:
            self._attach()

    def _attach(self) -> None:
        assert self._copier is not None
        self._client = self._link.take()
        if self._client is None:
            self._link.start()
        else:
            self._copier.attach(self._client.pool)

    def _detach(self) -> None:
        if self._client is None:
            return
        # Copies under way keep the mapping through their own reference to the client's pool.
        with self._changed:
            while self._num_loading:
                self._changed.wait()
        for job in self._jobs:
            job.settle(0.0)
        if self._copier is not None:
            self._copier.detach()
        self._client.close()
        self._client = None

    def _load(self, load: Load, client: NodeClient | None, node: bytes) -> None:
        """One asynchronous load, from its first chunk to its end; never raises."""
        failed = True
        try:
            if client is None or client.hello.node != node:
                raise DeadlineExceeded("this worker is not attached to the lease's node")
            self._load_chunks(load, client)
            failed = False
        except KVStrataError as error:
            logger.warning("KVStrata: request %s is computed: %s", load.request_id, error)
        except Exception:
            logger.exception("KVStrata: a load died of a bug; request %s is computed",
                             load.request_id)  # fmt: skip
        finally:
            with self._changed:
                self._num_loading -= 1
                self._loaded.add(load.request_id)
                if failed:
                    self._failed.add(load.request_id)
                self._changed.notify_all()

    def _load_chunks(self, load: Load, client: NodeClient) -> None:
        assert self._pages is not None and self._copier is not None
        deadline = time.monotonic() + self._config.deadlines.load
        per_chunk = len(load.blocks) // len(load.keys)
        offsets = [chunk[self._rank] for chunk in load.offsets]
        done, total = 0, len(offsets)
        while done < total:
            ready = done
            while ready < total and offsets[ready] != p.ARRIVING:
                ready += 1
            if ready == done:
                have = load.first_chunk + done
                left = deadline - time.monotonic()
                arrived: p.Arrived = client.await_arrival(load.lease, have).wait(max(left, 0.001))
                came = offsets_of(arrived.offsets)[self._rank :: self._world]
                if not came:
                    raise CorruptObject(f"chunk {have} will not come")
                offsets[done : done + len(came)] = came[: total - done]
                continue
            payloads = [
                self._payload(client, offsets[i], load.keys[i]) for i in range(done, ready)
            ]
            blocks = load.blocks[done * per_chunk : ready * per_chunk]
            self._copier.load(Plan(self._pages, [address for address, _ in payloads], blocks))
            done = ready

    def _payload(self, client: NodeClient, offset: int, key: bytes) -> tuple[int, object]:
        """Address of a chunk's native payload, and what keeps it there.

        Raises:
            CorruptObject: the slot holds another object than the one that was asked for.
        """
        header = decode(client.pool.view(offset, HEADER_BYTES))
        if header.key != key or header.rank != self._rank:
            raise CorruptObject("a slot holds another object than the one that was leased")
        return payload_address(client.pool, offset), client.pool

    def _begin_store(self, store: Store, cost: float) -> None:
        client = self._client
        if client is None or not client.alive or self._copier is None:
            return
        self._jobs = [job for job in self._jobs if not job.ended.is_set()]
        if len(self._jobs) >= MAX_WAITING_STORES:
            self._num_dropped += 1
            return
        job = StoreJob(store, frozenset(store.blocks), self._copier.mark(), cost)
        self._jobs.append(job)
        self._storing.submit(self._store, job, client)

    def _store(self, job: StoreJob, client: NodeClient) -> None:
        """One store, from reservation to commit; never raises."""
        try:
            self._store_chunks(job, client)
        except KVStrataError as error:
            logger.warning("KVStrata: a store was dropped: %s", error)
        except Exception:
            logger.exception("KVStrata: a store died of a bug")
        finally:
            job.ended.set()

    def _store_chunks(self, job: StoreJob, client: NodeClient) -> None:
        assert self._pages is not None and self._copier is not None and self._template is not None
        store, patience = job.store, self._config.deadlines.request
        reserved: p.Reserved = client.reserve(
            store.namespace, store.prefix, store.first, self._rank, self._template, job.cost
        ).wait(patience)
        offsets = offsets_of(reserved.offsets)
        checksums = [NOT_WRITTEN] * len(offsets)
        per_chunk = len(store.blocks) // len(offsets)
        try:
            if job.begin_copy():
                for i, offset in enumerate(offsets):
                    if offset >= 0:
                        blocks = store.blocks[i * per_chunk : (i + 1) * per_chunk]
                        payload = [payload_address(client.pool, offset)]
                        self._copier.store(Plan(self._pages, payload, blocks), job.after)
                # The blocks may go now; what remains reads the slots.
                job.ended.set()
                for i, offset in enumerate(offsets):
                    if offset >= 0:
                        view = client.pool.view(offset + HEADER_BYTES, self._template.raw_length)
                        checksums[i] = checksum(view)
        finally:
            if any(offset >= 0 for offset in offsets):
                client.commit(reserved.reservation, checksums).wait(patience)


def copy_in(slots: Sequence[int], blocks: Sequence[int], lengths: Sequence[int]) -> None:
    """Copy runs from slots into blocks, on this thread."""
    import ctypes

    for slot, block, length in zip(slots, blocks, lengths, strict=True):
        ctypes.memmove(block, slot, length)


def _use_all_cores() -> None:
    """vLLM binds the worker's main thread to one core, and threads inherit that."""
    try:
        os.sched_setaffinity(threading.get_native_id(), range(os.cpu_count() or 1))
    except OSError:
        logger.debug("KVStrata: a copy thread keeps to the engine's core")
