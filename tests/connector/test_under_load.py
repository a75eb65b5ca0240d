"""What a request costs the others, and they it: waits that are short against a step, or none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import TIMEOUT_S, GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_hints import say
from tests.connector.test_worker_side import open_later, slow, stored
from vllm.v1.request import RequestStatus

from kvstrata.connectors.threads import STORE_NICENESS
from kvstrata.connectors.vllm import worker as worker_module
from kvstrata.connectors.vllm.messages import StepMetadata
from kvstrata.connectors.vllm.pace import COPY_SHARE, WAIT_SHARE, Pace
from kvstrata.connectors.vllm.stores import StoreJob
from kvstrata.testing.clock import ManualClock
from kvstrata.wire import protocol as p

Make = Callable[..., Rig]


class Steady(Pace):
    """Every step takes as long as a test says."""

    def __init__(self, step_s: float, longest_s: float = TIMEOUT_S) -> None:
        self.by_hand = ManualClock()
        super().__init__(longest_s, self.by_hand)
        self.every_s = step_s

    def step_s(self, num_tokens: int = 0) -> float:
        return self.every_s


def busy(rig: Rig, step_s: float, longest_s: float = TIMEOUT_S) -> Steady:
    """Somebody runs, in steps of this length."""
    pace = rig.side._pace = rig.side._lookups.pace = Steady(step_s, longest_s)
    rig.add(prompt(40, seed=1), 200)
    rig.step()
    return pace


def pumps(rig: Rig, instead: Callable[[float], None] = lambda timeout_s: None) -> list[float]:
    """How long the engine's thread was ready to wait each time; no answer comes meanwhile."""
    client = rig.side._lookups.client
    assert client is not None
    waits: list[float] = []
    real = client.pump

    def pump(call: Any, timeout_s: float) -> None:
        if threading.current_thread() is not threading.main_thread() or timeout_s <= 0:
            real(call, timeout_s)
        else:
            waits.append(timeout_s)
            instead(timeout_s)

    client.pump = pump  # type: ignore[method-assign]
    return waits


# what vLLM has itself


@pytest.mark.parametrize("pipelined", [False, True])
def test_what_vllm_has_itself_waits_for_no_match(make_rig: Make, pipelined: bool) -> None:
    rig = make_rig(pipelined=pipelined)
    tokens = prompt(200)
    rig.ask(tokens)
    rig.settle()
    busy(rig, 1000.0)
    gate = rig.gate(p.Match)
    waits = pumps(rig)
    name = rig.add(tokens, 3)
    assert rig.step().num_tokens == 1 + 200 - 12 * BLOCK
    assert rig.scheduler.requests[name].status == RequestStatus.RUNNING
    assert waits == []
    del rig.side._lookups.client.pump  # type: ignore[union-attr]
    gate.open()
    # The lease goes back although the request still runs.
    rig.until(lambda: (rig.state()["counters"]["matches_total"], rig.num_leases()) == (3, 0))
    rig.run()
    assert rig.num_external == 0
    rig.check()


def test_what_vllm_has_and_the_node_lost_is_stored_again(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.ask(tokens)
    rig.settle()
    assert rig.node is not None
    client = rig.node.connect()
    client.clear()
    client.close()
    rig.ask(tokens)
    rig.settle()
    rig.reset()
    assert rig.ask(tokens) == 6 * CHUNK
    rig.check()


def test_what_the_node_is_known_to_have_is_not_stored_again(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.ask(tokens)
    rig.settle()
    name = rig.add(tokens, 2)
    rig.until(lambda: rig.num_leases() == 1)  # the answer is on its way
    assert rig.side._states[name].call is not None
    assert rig.step().stores == []
    rig.until(lambda: rig.num_leases() == 0)
    rig.run()
    rig.check()


# how long a busy engine waits for a match


def test_a_busy_engine_waits_for_a_match_that_is_short_against_a_step(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    busy(rig, 1000.0)
    gate = rig.gate(p.Match)
    client = rig.side._lookups.client
    assert client is not None
    real = client.pump

    def pump(call: Any, timeout_s: float) -> None:
        if timeout_s > 0:
            gate.open()  # the answer comes while the engine waits, never before
        real(call, timeout_s)

    client.pump = pump  # type: ignore[method-assign]
    name = rig.add(tokens, 2)
    step = rig.step()
    assert [load.request_id for load in (*step.sync_loads, *step.async_loads)] == [name]
    rig.run()
    rig.check()


def test_many_requests_wait_no_longer_than_one_and_none_waits_twice(make_rig: Make) -> None:
    rig = make_rig()
    pace = busy(rig, 2.0)
    gate = rig.gate(p.Match)
    waits = pumps(rig, lambda timeout_s: pace.by_hand.advance(timeout_s * 0.75))
    for seed in range(5):
        rig.add(prompt(100, seed=2 + seed))
    rig.step()
    assert len(waits) == 5
    assert sum(waits) * 0.75 < WAIT_SHARE * 2.0
    for _ in range(3):
        assert rig.step().num_tokens == 1
    assert len(waits) == 5, "a node that hangs holds up no later step"
    del rig.side._lookups.client.pump  # type: ignore[union-attr]
    gate.open()
    rig.run()
    rig.check()


# loads beside others


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_copy_that_is_short_against_a_step_is_part_of_it(
    make_rig: Make, ranks: int, pipelined: bool
) -> None:
    rig = make_rig(ranks=ranks, pipelined=pipelined)
    tokens = prompt(200)
    rig.warm(tokens)
    rig.ask(tokens)  # how fast a copy is
    rig.settle()
    rig.reset()
    assert rig.side._copy_rate > 0
    busy(rig, 1000.0)
    name = rig.add(tokens, 3)
    step = rig.step()
    assert [load.request_id for load in step.sync_loads] == [name]
    assert step.num_tokens == 1 + 200 - 6 * CHUNK
    rig.run()
    assert len(rig.answers[name]) == 3
    rig.check()


@pytest.mark.parametrize("rate", ["slow", "unknown"])
def test_a_copy_that_is_long_against_a_step_or_unknown_is_not(make_rig: Make, rate: str) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    pace = busy(rig, 1000.0)
    rig.side._copy_rate = 1e-3 if rate == "slow" else 0.0
    rig.add(tokens)
    step = rig.step()
    assert not step.sync_loads
    assert len(step.async_loads) == 1
    assert pace._copying_s == 0.0
    rig.run()
    rig.check()


def test_the_copies_of_one_step_are_short_together(make_rig: Make) -> None:
    rig = make_rig()
    prompts = [prompt(200, seed=2 + i) for i in range(3)]
    rig.warm(*prompts)
    busy(rig, 1000.0)
    # Two fit into what a step may spend on copies.
    rig.side._copy_rate = 6 * max(rig.side._lookups.lengths) / (0.4 * COPY_SHARE * 1000.0)
    for tokens in prompts:
        rig.add(tokens, 2)
    step = rig.step()
    assert (len(step.sync_loads), len(step.async_loads)) == (2, 1)
    rig.run()
    rig.check()


def test_what_is_still_arriving_is_no_part_of_a_step(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    busy(rig, 1000.0)
    rig.side._copy_rate = 1e12
    tier.opened.clear()
    rig.add(tokens)
    step = rig.step()
    assert (len(step.sync_loads), len(step.async_loads)) == (0, 1)
    tier.opened.set()
    rig.run()
    rig.check()


def test_a_load_that_ends_with_the_forward_is_reported_in_that_step(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    worker, load = stored(rig, 128)
    copier = slow(rig)
    for name, long in (("STEP_WAIT_S", TIMEOUT_S), ("WAIT_SHARE", 1e9)):
        monkeypatch.setattr(worker_module, name, long)
    worker.before_step(StepMetadata(node=worker._node))
    worker.bind(StepMetadata(node=worker._node, async_loads=[load], num_tokens=1))
    assert copier.begun.wait(TIMEOUT_S)
    timer: threading.Timer = open_later(copier)
    assert worker.loads_ended() == ({load.request_id}, set())
    timer.join()
    rig.side._end_load(load.request_id, failed=False)
    rig.settle()


def test_a_step_waits_for_no_load_that_has_to_arrive(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    rig.warm(prompt(200))
    rig.drop_host()
    for name, long in (("STEP_WAIT_S", 10 * TIMEOUT_S), ("WAIT_SHARE", 1e9)):
        monkeypatch.setattr(worker_module, name, long)
    tier.opened.clear()
    busy(rig, 1000.0)
    rig.add(prompt(200))
    assert rig.step().async_loads
    rig.step()  # it would not end
    assert rig.loaded == []
    tier.opened.set()
    rig.run()
    rig.check()


def test_stores_yield_to_the_engine_and_loads_do_not(make_rig: Make) -> None:
    (worker,) = make_rig().workers

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    transfers = worker._transfers
    assert transfers.stores._storing.submit(niceness).result() == min(
        19, niceness() + STORE_NICENESS
    )
    assert transfers._loading.submit(niceness).result() == niceness()
    assert transfers._awaiting.submit(niceness).result() == niceness()


def test_only_a_store_that_nobody_waits_for_yields(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(extra={"network.listen": "127.0.0.1:0"})
    (worker,) = rig.workers
    how: list[tuple[bool, int]] = []
    real = worker._transfers.stores._store_chunks

    def store_chunks(job: StoreJob, *others: Any) -> None:
        how.append((job.store.lend, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        real(job, *others)

    monkeypatch.setattr(worker._transfers.stores, "_store_chunks", store_chunks)
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    rig.ask(prompt(CHUNK), **say({}))
    rig.ask(prompt(CHUNK, 1), **say({}, do_remote_decode=True))
    rig.check()
    # Two threads: which of them begins first is nobody's to say.
    assert sorted(how) == [(False, min(19, here + STORE_NICENESS)), (True, here)]
