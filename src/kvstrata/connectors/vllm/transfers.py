"""Loads of one worker, and its stores: threads of their own, each copy at its end or never begun.

A load fills a request's blocks from leased slots as these arrive.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from kvstrata.config import DeadlineConfig
from kvstrata.connectors.threads import use_given_cores
from kvstrata.connectors.vllm.backwards import bring
from kvstrata.connectors.vllm.blends import BlendJob
from kvstrata.connectors.vllm.copies import Copier, Plan
from kvstrata.connectors.vllm.gathering import Gatherer
from kvstrata.connectors.vllm.meeting import Meeting, Meetings
from kvstrata.connectors.vllm.messages import Load
from kvstrata.connectors.vllm.pace import Rate
from kvstrata.connectors.vllm.payloads import Payloads
from kvstrata.connectors.vllm.stats import Tally
from kvstrata.connectors.vllm.stores import Stores
from kvstrata.errors import DeadlineExceeded, KVStrataError, NodeUnavailable, UsageError
from kvstrata.observe.tracing import Tracer
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

NUM_LOAD_THREADS = 2
#: of which most sleep; an engine that decodes has a load for each prompt that is computed elsewhere
NUM_AWAITING_THREADS = 16
#: for how long one sleeps before it sees that its request has ended
SLEEP_S = 0.05


class Transfers:
    """Copies between a node's slots and this worker's blocks.

    Args:
        payloads: the worker's objects of a chunk, by their part.
        copier: copies between the engine's blocks and the pool.
        world: number of workers.
        deadlines: for a load as a whole, and for each answer of the node to a store.
        tally: counts what is stored.
        tracer: of those stores that are traced.
    Attributes:
        stores: the other way.
    """

    def __init__(
        self,
        payloads: Mapping[int, Payloads],
        copier: Copier,
        world: int,
        deadlines: DeadlineConfig,
        tally: Tally,
        tracer: Tracer | None,
    ) -> None:
        self._payloads = payloads
        self._copier = copier
        self._deadlines = deadlines
        self.stores = Stores(payloads, copier, world, deadlines.request, tally, tracer)
        self._loading = ThreadPoolExecutor(NUM_LOAD_THREADS, "kvstrata-load", use_given_cores)
        # What waits for a slower tier must not hold up what is there.
        self._awaiting = ThreadPoolExecutor(NUM_AWAITING_THREADS, "kvstrata-wait", use_given_cores)
        self._changed = threading.Condition()
        self._num_loading = 0
        self._under_way: set[str] = set()
        self._unwanted: set[str] = set()  # of these, whose requests have ended
        # of these, loads of what is there, which end soon
        self._num_copying = 0
        self.rate = Rate()
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._cut: dict[str, tuple[int, set[int]]] = {}

    def begin_loads(
        self, loads: list[Load], client: NodeClient | None, meetings: Meetings | None = None
    ) -> None:
        """Begin loads into blocks that the engine has finished with; each ends exactly once.

        Args:
            loads: that the scheduler's side planned.
            client: of the node.
            meetings: those of them with a front are part of; `meeting_ended` ends them.
        """
        after = self._copier.mark()
        deadline = time.monotonic() + self._deadlines.load
        for load in loads:
            if meetings is not None and load.front is not None:
                self._begin_meeting(meetings.begin(load), client, after, deadline)
                continue
            arriving = any(p.ARRIVING in chunk for chunk in load.offsets)
            with self._changed:
                self._num_loading += 1
                self._under_way.add(load.request_id)
                self._num_copying += not arriving
            threads = self._awaiting if arriving else self._loading
            future = threads.submit(self._load, load, client, after, deadline, arriving)
            future.add_done_callback(partial(self._called_off, load, arriving))

    def begin_blends(
        self, jobs: Sequence[BlendJob], gatherer: Gatherer, client: NodeClient | None
    ) -> None:
        """Begin to copy what belongs into blends; `blend_ended` ends them."""
        after = self._copier.mark()
        deadline = time.monotonic() + self._deadlines.load
        for job in jobs:
            spans = gatherer.spans(job)
            job.begin(len(spans))
            for span in spans:
                work = partial(gatherer.bring, job, span, client, after, deadline)
                self._begin(work, lambda _, one=job: one.thread_ended())  # type: ignore[misc]

    def blend_ended(self, request_id: str, *, failed: bool) -> None:
        """A blend is complete, or will not be: its blocks are the engine's again."""
        with self._changed:
            self._loaded.add(request_id)
            if failed:
                self._failed.add(request_id)

    def meeting_ended(self, meeting: Meeting) -> None:
        """A load has met what was computed, or will not: its blocks are the engine's again."""
        came = meeting.computed - meeting.load.first_chunk
        with self._changed:
            self._loaded.add(meeting.load.request_id)
            if not meeting.met:
                self._cut_at(meeting.load, came)

    def call_off(self, request_ids: set[str]) -> None:
        """Let the loads of these requests end without what has not come yet."""
        with self._changed:
            self._unwanted |= request_ids & self._under_way

    def loads_ended(self, wait_s: float, *, idle: bool = True) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended since the last call, and those of them that failed.

        Args:
            wait_s: how long to wait if loads are under way and none has ended.
            idle: whether to wait for chunks that have to arrive first, too.
        """
        with self._changed:
            if (self._num_loading if idle else self._num_copying) and not self._loaded:
                self._changed.wait(wait_s)
            loaded, self._loaded = self._loaded, set()
            failed, self._failed = self._failed, set()
        return loaded, failed

    def loads_cut(self) -> dict[str, tuple[int, set[int]]]:
        """Loads that ended early since the last call, and are among `loads_ended`'s.

        For each request the number of the first chunk that did not come, and the blocks from there
        on, which hold nothing of use.
        """
        with self._changed:
            cut, self._cut = self._cut, {}
        return cut

    def settle(self) -> None:
        """Return when no copy is under way; loads end at their deadline at the latest."""
        with self._changed:
            while self._num_loading:
                self._changed.wait()
        self.stores.settle()

    @property
    def read_portable(self) -> bool:
        """Whether anything was loaded that may have been through a lossy codec."""
        return any(one.read_portable for one in self._payloads.values())

    def plan(
        self, load: Load, client: NodeClient | None, offsets: list[list[int]], first: int, last: int
    ) -> tuple[list[Plan], list[object]]:
        """How chunks of a load get into their blocks, see `Payloads.plans`.

        Raises:
            NodeUnavailable: the client is not the one of the node that holds the lease.
        """
        client = _of_node(client, load)
        plans: list[Plan] = []
        kept: list[object] = []
        for payloads in self._payloads.values():
            some, keep = payloads.plans(load, client, offsets, first, last)
            plans += some
            kept += keep
        return plans, kept

    def close(self) -> None:
        """End the threads, and what they do. Repeatable."""
        self._loading.shutdown(wait=True, cancel_futures=True)
        self._awaiting.shutdown(wait=True, cancel_futures=True)
        self.stores.close()

    def _load(
        self,
        load: Load,
        client: NodeClient | None,
        after: Any,
        deadline: float,
        arriving: bool,
    ) -> None:
        """One load, from its first chunk to its end; never raises."""
        failed, came = True, len(load.keys)
        try:
            came = self._load_chunks(load, client, after, deadline)
            failed = False
        except KVStrataError as error:
            logger.warning("KVStrata: request %s is computed: %s", load.request_id, error)
        except Exception:
            logger.exception("KVStrata: a load died of a bug, request %s", load.request_id)
        finally:
            self._load_ended(load, arriving, came, failed=failed)

    def _called_off(self, load: Load, arriving: bool, future: Future[None]) -> None:
        """A load that had not begun when its threads ended has ended all the same, and failed."""
        if future.cancelled():
            self._load_ended(load, arriving, len(load.keys), failed=True)

    def _load_ended(self, load: Load, arriving: bool, came: int, *, failed: bool) -> None:
        with self._changed:
            self._num_loading -= 1
            self._num_copying -= not arriving
            self._under_way.discard(load.request_id)
            self._unwanted.discard(load.request_id)
            self._loaded.add(load.request_id)
            if came < len(load.keys):
                self._cut_at(load, came)
            if failed:
                self._failed.add(load.request_id)
            self._changed.notify_all()

    def _cut_at(self, load: Load, came: int) -> None:
        """Nothing of use is in the blocks of the chunks from number ``came`` of the load on."""
        rest = load.blocks[came * len(load.blocks) // len(load.keys) :]
        missing = {block for block in rest if block >= 0}
        self._cut[load.request_id] = load.first_chunk + came, missing

    def _begin_meeting(
        self, meeting: Meeting, client: NodeClient | None, after: Any, deadline: float
    ) -> None:
        def copy(offsets: list[list[int]], first: int, last: int) -> None:
            self._copy(meeting.load, client, offsets, first, last, after)
            with self._changed:
                self._changed.notify_all()

        def ended(cancelled: bool) -> None:
            if cancelled:
                meeting.fail()

        self._begin(partial(bring, meeting, client, copy, deadline), ended)

    def _begin(self, work: Callable[[], None], ended: Callable[[bool], None]) -> None:
        """Have a thread do some work; then, or if it will not be done, ``ended`` hears which."""

        def end(future: Future[None]) -> None:
            ended(future.cancelled())
            with self._changed:
                self._num_loading -= 1
                self._changed.notify_all()

        with self._changed:
            self._num_loading += 1
        self._awaiting.submit(work).add_done_callback(end)

    def _copy(
        self,
        load: Load,
        client: NodeClient | None,
        offsets: list[list[int]],
        first: int,
        last: int,
        after: Any,
    ) -> None:
        """Copy these chunks of a load into their blocks."""
        plans, kept = self.plan(load, client, offsets, first, last)
        begun = time.perf_counter()
        for plan in plans:
            self._copier.load(plan, after)
        self.rate.note(sum(plan.nbytes for plan in plans), time.perf_counter() - begun)
        del kept

    def _load_chunks(
        self, load: Load, client: NodeClient | None, after: Any, deadline: float
    ) -> int:
        """Copy chunks as they arrive; how many came before one that will not."""
        if not load.keys:
            raise UsageError("vLLM takes less than was found, and part of that is of no use")
        offsets = list(load.offsets)
        done, total = 0, len(offsets)
        if load.followed:
            deadline = time.monotonic() + self._deadlines.load
        while done < total:
            ready = done
            while ready < total and p.ARRIVING not in offsets[ready]:
                ready += 1
            if ready > done:
                self._copy(load, client, offsets, done, ready, after)
                done = ready
                continue
            have = load.first_chunk + done
            came = self._arrived(load, _of_node(client, load), have, deadline)
            if not came and load.whole:
                raise DeadlineExceeded(f"chunk {have} did not come")
            if not came:
                logger.info("KVStrata: request %s is computed from chunk %d on: it did not come",
                            load.request_id, have)  # fmt: skip
                break
            if load.followed:
                deadline = time.monotonic() + self._deadlines.load
            stride = len(load.parts)
            chunks = [came[i : i + stride] for i in range(0, len(came), stride)]
            offsets[done : done + len(chunks)] = chunks[: total - done]
        return done

    def _arrived(self, load: Load, client: NodeClient, have: int, deadline: float) -> list[int]:
        """The slots of the chunks behind those one has, once there are any; none: none come."""
        call = client.await_arrival(load.lease, have)
        while call.reply is None and load.request_id not in self._unwanted:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            client.pump(call, min(left, SLEEP_S))
        try:
            arrived: p.Arrived = call.wait(0)
        except DeadlineExceeded:
            return []
        return offsets_of(arrived.offsets).tolist()


def _of_node(client: NodeClient | None, load: Load) -> NodeClient:
    """The client, if it is one of the node whose pool the load reads."""
    if client is None or client.hello.node != load.node:
        raise NodeUnavailable("this worker is not attached to the node of the lease")
    return client
