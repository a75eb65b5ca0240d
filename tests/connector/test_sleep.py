"""An engine that sleeps and wakes: nothing copies from blocks that go, and all is learnt anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector import rig as rig_module
from tests.connector.gates import TIMEOUT_S, GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_worker_side import open_later, slow, stored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.messages import Store, WorkerHello
from kvstrata.wire import protocol as p

Make = Callable[..., Rig]


@pytest.mark.parametrize("told", [True, False])
def test_an_engine_that_may_sleep_ends_its_stores_in_each_step_unless_it_is_told(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """vLLM 0.32 says nothing before its blocks go, not even an empty step if requests are kept."""
    if told:
        hook = KVStrataConnector.unregister_kv_caches
        monkeypatch.setattr(KVConnectorBase_V1, "unregister_kv_caches", hook, raising=False)
    else:
        monkeypatch.delattr(KVConnectorBase_V1, "unregister_kv_caches", raising=False)
    model_config = rig_module._engine_config().model_config
    monkeypatch.setattr(model_config, "enable_sleep_mode", True)
    rig = make_rig()
    copier = slow(rig)
    rig.add(prompt(128), 30)
    timer = None if told else open_later(copier)
    assert rig.step().stores
    (job,) = rig.workers[0]._transfers.stores._jobs
    assert job.ended.is_set() is not told
    copier.opened.set()
    if timer is not None:
        timer.join()
    rig.run()
    rig.check()


@pytest.mark.parametrize("kind", ["load", "store"])
def test_copies_have_ended_when_blocks_are_unmapped(make_rig: Make, kind: str) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    connector: Any = SimpleNamespace(_worker=worker)
    KVStrataConnector.unregister_kv_caches(connector)  # nothing is under way
    copier = slow(rig)
    if kind == "load":
        worker._transfers.begin_loads([load], worker._client)
    else:
        stores = [Store(bytes(32), [bytes([i] * 32)], 0, load.blocks[:2]) for i in (8, 9)]
        worker._begin_stores(stores, 1.0)
    assert copier.begun.wait(TIMEOUT_S)
    timer: threading.Timer = open_later(copier)
    KVStrataConnector.unregister_kv_caches(connector)
    assert copier.opened.is_set(), "it waited for the copy"
    KVStrataConnector.unregister_kv_caches(connector)
    timer.join()
    jobs = worker._transfers.stores._jobs
    assert all(job.ended.is_set() and not job.cancelled for job in jobs), "none was dropped"
    if kind == "load":
        assert worker.loads_ended() == ({load.request_id}, set())
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()
    connector._worker = None  # a model that is not cached
    KVStrataConnector.unregister_kv_caches(connector)


def hellos(rig: Rig) -> dict[tuple[int, int], WorkerHello]:
    return {(0, rank): worker.hello() for rank, worker in enumerate(rig.workers)}


def test_a_second_handshake_changes_nothing_if_the_workers_are_as_they_were(make_rig: Make) -> None:
    rig = make_rig(ranks=2)
    tokens, other = prompt(200), prompt(100, seed=1)
    rig.warm(tokens)
    name = rig.add(other, 40)
    rig.step()
    rig.connector.set_xfer_handshake_metadata_pp_aware(hellos(rig))
    assert rig.side._states[name].bypass == ""
    rig.run()
    rig.settle()
    rig.reset()
    assert rig.ask(tokens) == 6 * 32
    assert rig.ask(other + rig.answers[name]) > 3 * 32, "it was stored after the handshake, too"
    rig.check()


def test_a_second_handshake_with_other_workers_lets_go_of_what_was_asked(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens, waiting = prompt(200), prompt(128, seed=1)
    rig.warm(tokens, waiting)
    rig.drop_host()
    tier.opened.clear()
    loading = rig.add(tokens, 2)
    while not rig.side._loads:
        rig.step()
    gate = rig.gate(p.Match)
    asking = rig.add(waiting, 2)
    (rank, hello), *_ = hellos(rig).items()
    other = replace(hello, held=(replace(hello.held[0], order="some other"),))
    rig.connector.set_xfer_handshake_metadata_pp_aware({rank: other})
    assert {rig.side._states[name].bypass for name in (loading, asking)} == {
        "the workers have changed"
    }
    rig.connector.set_xfer_handshake_metadata_pp_aware({rank: hello})
    gate.open()
    tier.opened.set()
    rig.run()
    rig.settle()
    rig.reset()
    assert rig.ask(tokens) == 6 * 32, "what comes later is cached as ever"
    rig.check()


def test_a_handshake_can_turn_it_off_and_on_again(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    before = hellos(rig)
    rig.side.introduce({(0, 0): WorkerHello(problem="asleep")})
    assert rig.ask(tokens) == 0
    rig.reset()
    rig.side.introduce(before)
    assert rig.ask(tokens) == 6 * 32
    rig.check()


def sleep_and_wake(rig: Rig) -> None:
    """What vLLM 0.33 does to its connector, in this order; the blocks hold something else then."""
    rig.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    for worker, memory in zip(rig.workers, rig.memories, strict=True):
        worker.drain()
        memory.kv[:] = 0xEE
    rig.connector.restore_kv_caches()
    rig.connector.set_xfer_handshake_metadata_pp_aware(hellos(rig))


@pytest.mark.parametrize("reset", ["keep", "forget"])
def test_what_was_stored_is_kept_over_sleep_where_the_weights_stay(
    make_rig: Make, reset: str
) -> None:
    rig = make_rig(extra={"reset": reset})
    tokens = prompt(200)
    rig.warm(tokens)
    sleep_and_wake(rig)
    found = 6 * 32 if reset == "keep" else 0
    assert rig.ask(tokens) == found
    rig.check()


def test_requests_go_on_after_sleep_with_what_was_stored_of_them(make_rig: Make) -> None:
    rig = make_rig(extra={"reset": "keep"})
    tokens, other = prompt(200), prompt(100, seed=1)
    rig.warm(other)
    name = rig.add(tokens, 60)
    while len(rig.answers[name]) < 40:
        rig.step()
    rig.finish_stores()
    before = rig.num_external
    sleep_and_wake(rig)
    rig.add(other, 3)
    rig.run()
    assert rig.num_external > before + 6 * 32, "what it had computed itself came back, too"
    assert len(rig.answers[name]) == 60
    rig.check()
