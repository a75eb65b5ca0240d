"""The worker's side: no copy is torn, no load is lost, no byte of somebody else's is taken."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from tests.connector.fake_model import CHUNK, LAYERS, NAMES, digests
from tests.connector.gates import TIMEOUT_S, GatedTier, tiered
from tests.connector.rig import Rig, prompt

from kvstrata.connectors.vllm import stores as stores_module
from kvstrata.connectors.vllm import transfers as transfers_module
from kvstrata.connectors.vllm.copies import CpuCopier, Plan
from kvstrata.connectors.vllm.messages import Load, StepMetadata, Store
from kvstrata.connectors.vllm.stores import StoreJob, Stores
from kvstrata.connectors.vllm.worker import WorkerSide, chunk_cost
from kvstrata.errors import CorruptObject, NodeUnavailable, UsageError
from kvstrata.keys import owner_digest
from kvstrata.objects import HEADER_BYTES, checksum, decode, encode
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

Make = Callable[..., Rig]


class SlowCopier(CpuCopier):
    """Copies that begin, and do not end before somebody opens the gate."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = threading.Event()
        self.num_loads = self.num_stores = 0

    def load(self, plan: Plan, after: Any) -> None:
        self.num_loads += 1
        self.begun.set()
        assert self.opened.wait(TIMEOUT_S)
        super().load(plan, after)

    def store(self, plan: Plan, after: Any) -> None:
        self.num_stores += 1
        self.begun.set()
        assert self.opened.wait(TIMEOUT_S)
        super().store(plan, after)


def slow(rig: Rig) -> SlowCopier:
    copier = SlowCopier()
    for worker in rig.workers:
        worker._copier = worker._transfers._copier = worker._transfers.stores._copier = copier
    return copier


def open_later(copier: SlowCopier, seconds: float = 0.1) -> threading.Timer:
    timer = threading.Timer(seconds, copier.opened.set)
    timer.start()
    return timer


def stored(rig: Rig, length: int, seed: int = 0) -> tuple[WorkerSide, Load]:
    """A prompt's chunks in the node, leased, and the load that would bring them."""
    rig.ask(prompt(length, seed))
    rig.settle()
    rig.reset()
    request = rig.request(prompt(length, seed), name=f"lease-{seed}")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    per_chunk = CHUNK // 16
    count = length // CHUNK * per_chunk
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(10, 10 + count)),))
    rig.connector.update_state_after_alloc(request, blocks, length // CHUNK * CHUNK)
    meta, rig.side._next = rig.side._next, StepMetadata()
    (load,) = (*meta.sync_loads, *meta.async_loads)
    return rig.workers[0], load


# the fence


@pytest.mark.parametrize("fenced", [True, False])
def test_blocks_are_not_overwritten_while_a_store_reads_them(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """Without the fence the second prompt's bytes are stored under the first one's keys."""
    if not fenced:
        monkeypatch.setattr(Stores, "fence", lambda self, blocks: None)
    rig = make_rig(num_blocks=12)
    copier = slow(rig)
    first, second = prompt(128), prompt(128, seed=1)
    rig.add(first)
    while rig.scheduler.requests:
        rig.step()
    assert copier.begun.wait(TIMEOUT_S), "the copy has begun, and hangs"
    rig.reset()
    timer = open_later(copier)
    rig.ask(second)
    if fenced:
        assert copier.opened.is_set(), "the step waited for the copy"
    timer.join()
    rig.settle()
    rig.reset()
    if fenced:
        assert rig.ask(first) > 0
        assert rig.wrong() == []
    else:
        with pytest.raises(AssertionError, match="wrong KV"):
            rig.ask(first)
        rig.side._loads.clear()
        rig.scheduler.running.clear()


def test_a_store_that_has_not_begun_is_dropped_for_its_blocks(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(num_blocks=12, extra={"deadlines.request": "1s"})
    first, second = prompt(128), prompt(128, seed=1)
    gate = rig.gate(p.Reserve)
    # The node answers only after the worker's patience has ended: nothing may be copied then.
    rig.ask(first)
    rig.reset()
    rig.ask(second)
    gate.open()
    rig.reset()
    rig.settle()
    assert "dropped" in caplog.text
    assert rig.ask(first) == 0
    rig.settle()
    rig.reset()
    assert rig.ask(first) > 0, "later stores are as ever"
    assert rig.wrong() == []


def test_a_dropped_store_never_begins_to_copy(make_rig: Make) -> None:
    """The reservation comes in the very moment in which the fence has given up."""
    rig = make_rig()
    copier = slow(rig)
    copier.opened.set()
    gate = rig.gate(p.Reserve)
    worker = rig.workers[0]
    rig.ask(prompt(128))
    (job,) = worker._transfers.stores._jobs
    assert job.settle(0.0) is False
    gate.open()
    assert job.ended.wait(TIMEOUT_S)
    assert copier.num_stores == 0
    rig.settle()
    assert rig.state()["host"]["num_objects"] == 0


def test_each_layer_is_loaded_once_whoever_reads_it(make_rig: Make) -> None:
    """A draft model reads its layers several times in a step, and writes between; or never."""
    rig = make_rig()
    rig.warm(prompt(200))
    worker, kv = rig.workers[0], rig.memories[0].kv
    wanted = rig.memories[0].words(digests(prompt(200)[: 6 * CHUNK])).reshape(LAYERS, -1)
    kv[:] = 0
    rig.add(prompt(200))
    meta = rig.scheduler.schedule().kv_connector_metadata
    (load,) = meta.sync_loads

    def held(layer: int) -> Any:
        return kv[layer, load.blocks].reshape(-1)

    worker.before_step(meta)
    worker.bind(meta)
    worker.load_sync()
    worker.load_layer(NAMES[1])
    assert not held(0).any()
    assert np.array_equal(held(1), wanted[1])
    kv[1] = 7
    worker.load_layer(NAMES[1])
    worker.load_layer("of another model")
    assert (held(1) == 7).all(), "what was written since stays"
    worker.after_forward()
    assert np.array_equal(held(0), wanted[0]), "nobody has read it, and somebody may"
    assert (held(1) == 7).all()
    worker.before_step(StepMetadata(node=worker._node))
    kv[:] = 0
    worker.load_layer(NAMES[0])
    worker.after_forward()
    assert not kv.any(), "a step has its own loads alone"


def test_a_step_that_vllm_does_not_end_is_ended_before_the_next(make_rig: Make) -> None:
    rig = make_rig(ends="never")
    tokens = prompt(100)
    rig.add(tokens, 2)
    step = rig.step()
    assert step.stores
    assert rig.workers[0]._transfers.stores._jobs == []
    rig.step()
    (job, *_) = rig.workers[0]._transfers.stores._jobs
    assert (job.store.blocks, job.cost) == (step.stores[0].blocks, 0.0)
    rig.run()
    rig.warm()
    assert rig.ask(tokens) == 3 * CHUNK
    rig.check()


def test_the_blocks_of_loads_are_fenced_too(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    store = Store(bytes(32), [bytes([9] * 32)], 0, load.blocks[:2])
    worker._begin_stores([store], 1.0)
    assert copier.begun.wait(TIMEOUT_S)
    order: list[str] = []

    def ended(meta: StepMetadata) -> None:
        order.append("step")

    for meta in (
        StepMetadata(node=worker._node, async_loads=[load]),
        StepMetadata(node=worker._node, sync_loads=[load]),
    ):
        thread = threading.Thread(
            target=lambda m=meta: [call(m) for call in (worker.before_step, ended)]
        )
        thread.start()
        time.sleep(0.05)
        order.append("still")
        copier.opened.set()
        thread.join(TIMEOUT_S)
        assert order[-2:] == ["still", "step"]
        if not meta.sync_loads:
            copier.opened.clear()
            copier.begun.clear()
            worker._begin_stores([replace(store, prefix=[bytes([8] * 32)])], 1.0)
            assert copier.begun.wait(TIMEOUT_S)
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_late_stores_read_before_the_step_overwrites(make_rig: Make) -> None:
    """The last chunk of a request that has ended, while its blocks go to the next one at once."""
    rig = make_rig(num_blocks=8, pipelined=True)
    copier = slow(rig)
    timer = open_later(copier, 0.2)
    names = [rig.add(prompt(67, seed=i), 30) for i in range(6)]
    rig.run()
    timer.join()
    assert any(step.late_stores for step in rig.steps)
    rig.settle()
    rig.reset()
    for i, name in enumerate(names):
        rig.ask(rig.tokens[name][:96])
        assert rig.wrong() == [], i
    assert rig.num_external > 0


# the pool under a copy


@pytest.mark.parametrize("kind", ["load", "store"])
def test_the_pool_stays_until_the_copy_has_ended(make_rig: Make, kind: str) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    if kind == "load":
        worker._transfers.begin_loads([load], worker._client)
    else:
        store = Store(bytes(32), [bytes([9] * 32)], 0, load.blocks[:2])
        worker._begin_stores([store], 1.0)
    assert copier.begun.wait(TIMEOUT_S)
    assert worker._client is not None
    pool = worker._client.pool
    thread = threading.Thread(target=worker._detach)
    thread.start()
    time.sleep(0.05)
    assert not pool.closed, "a copy reads or writes it"
    copier.opened.set()
    thread.join(TIMEOUT_S)
    assert pool.closed
    assert worker._client is None
    rig.side._end_load(load.request_id, failed=False)
    rig.attach()
    rig.settle()


def test_a_node_that_dies_under_a_copy_harms_nothing(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(128)
    rig.ask(tokens)
    rig.settle()
    rig.reset()
    copier = slow(rig)
    busy = rig.add(prompt(40, seed=1), 60)
    rig.step()
    name = rig.add(tokens, 2)
    while not copier.num_loads:
        rig.step()
    rig.stop_node()
    rig.step()
    timer = open_later(copier)
    rig.run()
    timer.join()
    assert [len(rig.answers[n]) for n in (busy, name)] == [60, 2]
    assert rig.wrong() == []


# completions


def test_each_load_ends_once_whatever_happens_to_it(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(extra={"deadlines.load": "5s"})
    worker, load = stored(rig, 128)
    transfers, client = worker._transfers, worker._client
    never = [[p.ARRIVING]] * len(load.offsets)
    loads = [
        replace(load, request_id="right"),
        replace(load, request_id="of another node", node=bytes(16)),
        replace(load, request_id="of another lease", lease=1, offsets=never),
        replace(load, request_id="of other keys", keys=load.keys[::-1]),
        replace(load, request_id="out of the pool", offsets=[[1 << 50]] * len(load.offsets)),
        replace(load, request_id="out of the blocks", blocks=[10**9] * len(load.blocks)),
        replace(load, request_id="a bug", keys=[None] * len(load.keys)),  # type: ignore[list-item]
        replace(load, request_id="a shape", offsets=load.offsets[:1]),
    ]
    transfers.begin_loads(loads, client)
    transfers.begin_loads([replace(load, request_id="no node")], None)
    ended: list[str] = []
    failed: set[str] = set()
    deadline = time.monotonic() + TIMEOUT_S
    while len(ended) < len(loads) + 1:
        assert time.monotonic() < deadline
        now, wrong = transfers.loads_ended(0.01)
        assert wrong <= now
        ended += sorted(now)
        failed |= wrong
    assert sorted(ended) == sorted({load.request_id for load in loads} | {"no node"})
    assert "right" not in failed
    assert failed >= set(ended) - {"right", "a shape"}
    assert transfers.loads_ended(0.0) == (set(), set())
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_a_load_that_does_not_arrive_ends_at_its_deadline(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), extra={"deadlines.load": "150ms"})
    tokens = prompt(128)
    rig.ask(tokens)
    rig.settle()
    assert rig.node is not None
    client = rig.node.connect()
    client.flush()
    client.clear(tiers=["host"])
    client.close()
    rig.reset()
    tier.opened.clear()
    begun = time.monotonic()
    name = rig.add(tokens, 2)
    rig.run()
    assert 0.1 < time.monotonic() - begun < 10
    assert rig.cut == [name]
    assert len(rig.answers[name]) == 2
    tier.opened.set()
    assert rig.wrong() == []
    rig.settle()


def test_a_step_without_a_forward_waits_a_moment_for_a_load(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    worker._transfers.begin_loads([load], worker._client)
    assert worker._transfers.loads_ended(0.0) == (set(), set())
    open_later(copier, 0.05).join()
    assert worker._transfers.loads_ended(TIMEOUT_S) == ({load.request_id}, set())
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


# what is read


def test_a_slot_with_another_object_is_refused(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    client = worker._client
    assert client is not None
    transfers = worker._transfers

    def plan() -> Any:
        return transfers.plan(load, client, load.offsets, 0, len(load.keys))

    plan()
    offset = load.offsets[1][0]
    page = client.pool.array(offset, HEADER_BYTES)
    good = page.copy()
    header = decode(good.tobytes())
    for change in (
        {"key": bytes([7] * 32)},
        {"rank": 1},
        {"group": 1},
        {"dtype": "float16"},
        {"shape": (LAYERS, 1, *header.shape[2:5], header.shape[5] * 2)},
    ):
        page[:] = np.frombuffer(encode(structs.replace(header, **change)), np.uint8)
        with pytest.raises(CorruptObject):
            plan()
    page[:] = good
    plan()
    page[100] ^= 1
    with pytest.raises(CorruptObject):
        plan()
    page[:] = good
    with pytest.raises(UsageError, match="8 blocks for 3 chunks"):
        transfers.plan(replace(load, keys=load.keys[:-1]), client, load.offsets, 0, 1)
    with pytest.raises(NodeUnavailable):
        transfers.plan(load, None, load.offsets, 0, 1)
    with pytest.raises(NodeUnavailable):
        transfers.plan(replace(load, node=b"x" * 16), client, load.offsets, 0, 1)
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_a_torn_copy_does_not_get_a_checksum_that_fits(make_rig: Make) -> None:
    """The checksum is of the blocks, so what a copy loses on its way shows in the slot."""

    class Torn(CpuCopier):
        def store(self, plan: Plan, after: Any) -> None:
            super().store(plan, after)
            ctypes.memset(int(plan.slots[0, 0]) + 5, 0xA5, 7)

    rig = make_rig()
    for worker in rig.workers:
        worker._copier = worker._transfers._copier = worker._transfers.stores._copier = Torn()
    worker, load = stored(rig, 128)
    assert worker._client is not None
    (torn,), (whole,) = load.offsets[0], load.offsets[1]
    for offset, fits in ((torn, False), (whole, True)):
        header = decode(worker._client.pool.view(offset, HEADER_BYTES))
        payload = worker._client.pool.view(offset + HEADER_BYTES, header.raw_length)
        assert (checksum(payload) == header.raw_checksum) is fits
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_objects_say_whose_they_are_without_saying_who(make_rig: Make) -> None:
    rig = make_rig()
    owners: list[bytes] = []
    for salt in ("", "alice", "bob"):
        name = rig.add(prompt(128, seed=len(owners)), cache_salt=salt or None)
        state = rig.side._states[name]
        rig.run()
        rig.settle()
        assert rig.node is not None
        with contextlib.closing(rig.node.connect()) as client:
            matched = client.match(state.keys[:1], [0], rig.side._lookups.orders).wait(TIMEOUT_S)
            (offset,) = offsets_of(matched.offsets)
            header = decode(client.pool.view(offset, HEADER_BYTES))
            assert header.owner == owner_digest(client.hello.secret, "default", salt)
        owners.append(header.owner)
    assert len(set(owners)) == 3


def test_a_portable_payload_is_packed_for_the_engine(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 64)
    client, pages = worker._client, worker.payloads[0].pages
    assert client is not None
    offset = load.offsets[0][0]
    header = decode(client.pool.array(offset, HEADER_BYTES).tobytes())
    native = client.pool.array(offset + HEADER_BYTES, header.raw_length).copy()
    portable = pages.order.unpack_layers(native.reshape(*header.shape[:2], -1), pages.group)
    shape = pages.group.portable_shape(CHUNK)
    assert portable.shape == shape
    rewritten = structs.replace(header, kind="portable", order="", shape=shape)
    client.pool.array(offset, HEADER_BYTES)[:] = np.frombuffer(encode(rewritten), np.uint8)
    client.pool.array(offset + HEADER_BYTES, header.raw_length)[:] = (
        portable.reshape(-1).view(np.uint8)
    )  # fmt: skip
    (plan,), kept = worker._transfers.plan(load, client, load.offsets, 0, 1)
    CpuCopier().load(plan, None)
    assert kept
    copied = rig.memories[0].kv[:, load.blocks[:2]]
    assert (copied.reshape(-1) == native).all()
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_a_chunk_is_there_only_when_every_rank_has_it(make_rig: Make) -> None:
    rig = make_rig(ranks=2)
    tokens = prompt(128)
    second = rig.workers[1]._transfers.stores
    real = second.begin
    second.begin = lambda store, client, cost: None  # type: ignore[method-assign]
    rig.ask(tokens)
    rig.settle()
    rig.reset()
    assert rig.state()["host"]["num_objects"] == 4
    assert rig.ask(tokens) == 0, "one rank alone has it"
    second.begin = real  # type: ignore[method-assign]
    rig.reset()
    rig.ask(tokens)
    rig.settle()
    rig.reset()
    assert rig.state()["host"]["num_objects"] == 8
    assert rig.ask(tokens) == 128
    assert rig.wrong() == []
    rig.settle()


# pressure


def test_stores_are_dropped_under_pressure_and_loads_are_not(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores_module, "MAX_WAITING_STORES", 3)
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    for i in range(10):
        worker._begin_stores([Store(bytes(32), [bytes([50 + i] * 32)], 0, [40, 41])], 1.0)
    loads = [replace(load, request_id=str(i)) for i in range(10)]
    worker._transfers.begin_loads(loads, worker._client)
    copier.opened.set()
    ended: set[str] = set()
    deadline = time.monotonic() + TIMEOUT_S
    while len(ended) < 10:
        assert time.monotonic() < deadline
        done, failed = worker._transfers.loads_ended(0.05)
        assert not failed
        ended |= done
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()
    assert copier.num_stores == 3


def test_doubtful_steps_store_nothing_and_the_next_ones_do(make_rig: Make) -> None:
    """A step planned before the failure was heard computes from unfilled blocks as well."""
    rig = make_rig(pipelined=True)
    worker, load = stored(rig, 128)
    assert worker._num_in_flight == 2
    begun: list[Store] = []
    worker._transfers.stores.begin = (  # type: ignore[method-assign]
        lambda store, client, cost: begun.append(store)
    )
    store = Store(bytes(32), [bytes([9] * 32)], 0, [40, 41])
    bad = replace(load, keys=load.keys[::-1])
    sizes = []
    for sync in ([bad], [], [], []):
        meta = StepMetadata(node=worker._node, sync_loads=sync, stores=[store], num_tokens=1)
        worker.before_step(meta)
        worker.bind(meta)
        worker.load_sync()
        worker.after_forward()
        sizes.append(len(begun))
        if sync:
            assert worker.invalid_blocks() == set(load.blocks)
    assert sizes == [0, 0, 1, 2]
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_costs_are_coarse() -> None:
    assert chunk_cost(0.010) == chunk_cost(0.0105) == 2.0**-7
    assert chunk_cost(0.0) > 0
    assert chunk_cost(1.0) == 1.0


def test_closing_is_repeatable_and_ends_what_runs(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    worker._transfers.begin_loads([load], worker._client)
    timer = open_later(copier)
    worker.close()
    worker.close()
    timer.join()
    assert worker._client is None
    rig.side._end_load(load.request_id, failed=False)


def test_closing_ends_loads_that_have_not_begun(make_rig: Make) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    transfers, names = worker._transfers, [f"load-{i}" for i in range(5)]
    assert len(names) > transfers_module.NUM_LOAD_THREADS
    transfers.begin_loads([replace(load, request_id=name) for name in names], worker._client)
    assert copier.begun.wait(TIMEOUT_S)
    timer = open_later(copier)
    worker.close()
    timer.join()
    ended, failed = transfers.loads_ended(0.0)
    assert ended == set(names)
    assert len(failed) >= len(names) - transfers_module.NUM_LOAD_THREADS
    rig.side._end_load(load.request_id, failed=False)


def test_a_cancelled_store_is_not_waited_for_again() -> None:
    job = StoreJob(Store(namespace=b"", prefix=[], first=0, blocks=[1]), None, 0.0)
    assert not job.settle(0.0)
    assert job.cancelled
    assert not job.begin_copy()


def test_loads_that_wait_hold_up_none_that_are_there(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    slow_ones, fast = [prompt(128, seed=i) for i in range(3)], prompt(160, seed=9)
    for tokens in (*slow_ones, fast):
        rig.ask(tokens)
    rig.settle()
    rig.drop_host()
    rig.reset()
    rig.ask(fast)
    rig.settle()
    rig.reset()
    tier.opened.clear()
    names = [rig.add(tokens) for tokens in slow_ones]
    while sum(len(step.async_loads) for step in rig.steps) < len(names):
        rig.step()
    # The engine is not idle now: this one is loaded in the background too, and is there at once.
    quick = rig.add(fast)
    while not rig.answers[quick]:
        rig.step()
    assert not any(rig.answers[name] for name in names)
    tier.opened.set()
    rig.run()
    assert rig.failed == []
    rig.check()


def test_a_worker_that_lost_its_node_joins_it_again(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(128)
    rig.warm(tokens)
    (worker,) = rig.workers
    assert worker._client is not None
    worker._client.close()
    deadline = time.monotonic() + TIMEOUT_S
    while not (worker._client is not None and worker._client.alive):
        assert time.monotonic() < deadline
        rig.ask(prompt(20, seed=5))
        time.sleep(0.01)
    rig.reset()
    assert rig.ask(tokens) == 127 or rig.num_external > 0
    rig.check()


def test_a_node_that_has_gone_is_missed_though_nothing_is_asked(make_rig: Make) -> None:
    """The workers hear it from their stores; else they would leave their new node in each step."""
    rig = make_rig()
    name = rig.add(prompt(40), 400)
    rig.step()
    rig.settle()
    rig.stop_node()
    rig.start_node()
    assert rig.node is not None
    node = rig.node.server._identity

    def attached() -> bool:
        rig.step()
        assert name in rig.scheduler.requests, "it has ended before"
        for worker in rig.workers:
            assert all(job.ended.wait(TIMEOUT_S) for job in worker._transfers.stores._jobs)
        for link in (rig.side._lookups._link, *(worker._link for worker in rig.workers)):
            if (attaching := link._thread) is not None:
                attaching.join(TIMEOUT_S)
        client = rig.side._lookups.client
        here = client is not None and client.hello.node == node
        return here and all(worker._node == node for worker in rig.workers)

    rig.until(attached)
    rig.abort(name)
    rig.run()
    rig.check()
