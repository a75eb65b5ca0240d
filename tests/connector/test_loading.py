"""How vLLM's own scheduler comes to loads: when, how long it waits, what fails, what is leased."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import (
    Rig,
    prompt,
)
from vllm.v1.request import RequestStatus

from kvstrata.connectors.vllm.lookups import LOOK_AHEAD
from kvstrata.connectors.vllm.messages import StepMetadata
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.wire import protocol as p

Make = Callable[..., Rig]


# how a request is loaded


@pytest.mark.parametrize("length", [32, 64, 200, 256, 257])
def test_when_idle_a_load_is_synchronous_and_leaves_one_token(make_rig: Make, length: int) -> None:
    rig = make_rig()
    tokens = prompt(length)
    rig.warm(tokens)
    name = rig.add(tokens, 3)
    step = rig.step()
    (load,) = step.sync_loads
    assert step.has_sync
    assert step.async_loads == []
    # In the very step that found it, so no step was spent on waiting.
    assert step.num_tokens == max(1, length - length // CHUNK * CHUNK)
    assert sum(block >= 0 for block in load.blocks) == length // CHUNK * CHUNK // BLOCK
    rig.run()
    assert len(rig.answers[name]) == 3
    assert rig.state()["requests"][-1]["load"] == "sync"
    rig.check()


END = ("not a whole chunk", 200 - 6 * CHUNK, "", "")


def reasons(rig: Rig) -> list[tuple[str, int, str, str]]:
    """Of the last request: cause, tokens, tier, detail."""
    return [
        (one["why"], one["tokens"], one.get("tier", ""), one.get("detail", ""))
        for one in rig.state()["requests"][-1]["reasons"]
    ]


def test_beside_others_a_load_is_asynchronous_and_may_be_the_whole_prompt(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(256)
    rig.warm(tokens)
    other = rig.add(prompt(40, seed=1), 30)
    rig.step()
    name = rig.add(tokens, 2)
    call = rig.side._states[name].call
    assert call is not None
    rig.until(call.ready)  # the other request must not end before it
    while not rig.steps[-1].async_loads:
        step = rig.step()
        assert not step.sync_loads
    assert sum(block >= 0 for block in rig.steps[-1].async_loads[0].blocks) == 256 // BLOCK
    rig.run()
    assert rig.loaded == [name]
    assert [len(rig.answers[n]) for n in (other, name)] == [30, 2]
    assert rig.state()["requests"][-2]["load"] == "async"
    rig.check()


def test_what_is_still_arriving_is_never_loaded_synchronously(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    rig.add(tokens)
    step = rig.step()
    assert step.sync_loads == []
    while not rig.side._loads:
        step = rig.step()
    assert step.sync_loads == []
    tier.opened.set()
    rig.run()
    assert len(rig.loaded) == 1
    assert rig.failed == []
    record = rig.state()["requests"][-1]
    assert (record["slower_tokens"], record["host_tokens"]) == (192, 0)
    rig.check()


def test_without_all_workers_on_the_node_no_load_is_synchronous(make_rig: Make) -> None:
    rig = make_rig(ranks=2)
    tokens = prompt(200)
    rig.warm(tokens)
    assert rig.side._lookups.client is not None
    rig.side._worker_nodes = {rig.side._lookups.client.hello.node, b""}
    rig.add(tokens)
    assert rig.step().sync_loads == []
    rig.run()
    rig.check()


def test_only_what_lies_beyond_vllms_own_hit_is_loaded(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.ask(tokens)
    rig.settle()
    rig.reset()
    rig.ask(tokens[:80])  # vLLM has 5 blocks of it now: in the middle of a chunk
    rig.add(tokens)
    (load,) = rig.step().sync_loads
    assert load.first_chunk == 80 // CHUNK
    assert [block >= 0 for block in load.blocks[:4]] == [False, True, True, True]
    rig.run()
    assert rig.ask(tokens) == 0, "vLLM has all of it"
    rig.check()


def test_a_chunk_is_loaded_once_for_two_requests(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    first, second = rig.add(tokens, 2), rig.add(tokens, 2)
    while not rig.side._loads:
        rig.step()
    for _ in range(20):
        rig.step()
    assert set(rig.side._loads) == {first}
    assert rig.scheduler.requests[second].status == RequestStatus.WAITING
    tier.opened.set()
    rig.run()
    assert rig.loaded == [first]
    assert tier.num_reads == 6
    rig.check()


def test_the_second_request_goes_on_when_the_firsts_load_fails(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), extra={"deadlines.load": "100ms"})
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    names = rig.add(tokens, 2), rig.add(tokens, 2)
    rig.run()
    assert rig.cut[:1] == [names[0]]
    assert [len(rig.answers[name]) for name in names] == [2, 2]
    tier.opened.set()
    rig.check()


# how long a match may take


def test_an_idle_engine_waits_for_a_match_but_not_long(make_rig: Make) -> None:
    rig = make_rig(extra={"deadlines.match": "200ms", "deadlines.request": "10s"})
    gate = rig.gate(p.Match)
    rig.add(prompt(100))
    begun = time.monotonic()
    assert rig.step().num_tokens == 0
    waited = time.monotonic() - begun
    assert 0.15 < waited < 5
    gate.open()
    rig.run()
    rig.check()


def test_a_busy_engine_does_not_wait_for_a_match(make_rig: Make) -> None:
    rig = make_rig(extra={"deadlines.match": "5s", "deadlines.request": "20s"})
    rig.add(prompt(40, seed=1), 12)
    rig.step()
    gate = rig.gate(p.Match)
    name = rig.add(prompt(100))
    begun = time.monotonic()
    for _ in range(5):
        assert rig.step().num_tokens == 1
    assert time.monotonic() - begun < 4
    assert rig.scheduler.requests[name].status == RequestStatus.WAITING
    gate.open()
    rig.run()
    rig.check()


def test_a_match_past_its_deadline_is_a_miss_and_its_late_lease_goes_back(make_rig: Make) -> None:
    rig = make_rig(extra={"deadlines.match": "2ms", "deadlines.request": "1s"})
    tokens = prompt(200)
    rig.warm(tokens)
    gate = rig.gate(p.Match)
    assert rig.ask(tokens) == 0
    assert rig.state()["requests"][-1]["miss"] == "the match missed its deadline"
    assert reasons(rig) == [
        ("deadline", 6 * CHUNK, "", "the match missed its deadline"), END
    ]  # fmt: skip
    gate.open()
    rig.reset()
    assert rig.ask(tokens) > 0, rig.state()["requests"][-1]
    rig.check()


# what fails


def test_a_failed_load_is_remembered_and_recomputed(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), extra={"deadlines.load": "100ms"})
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    name = rig.add(tokens, 2)
    while not rig.cut:
        rig.step()
    request = rig.scheduler.requests[name]
    assert rig.connector.get_num_new_matched_tokens(request, 0) == (0, False)
    rig.run()
    assert rig.cut == rig.loaded == [name]
    assert rig.state()["requests"][-1]["miss"] == "the load ended before chunk 0"
    assert reasons(rig) == [("deadline", 6 * CHUNK, tier.name, "load"), END]
    tier.opened.set()
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lost", [0, 3, 5])
def test_what_came_before_a_chunk_that_is_lost_is_used(
    make_rig: Make, ranks: int, pipelined: bool, lost: int
) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), ranks=ranks, pipelined=pipelined)
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    for name, one in list(tier._objects.items()):
        header = decode(one.data[:HEADER_BYTES].tobytes())
        if header.start == lost * CHUNK and header.rank == ranks - 1:
            del tier._objects[name]
    before = len(rig.steps)
    rig.ask(tokens, 2)
    assert rig.failed == []
    assert len(rig.loaded) == 1
    # Up to the lost chunk nothing was computed, and one more step answers the second token.
    assert sum(step.num_tokens for step in rig.steps[before:]) == 200 - lost * CHUNK + 1
    record = rig.state()["requests"][-1]
    assert record["loaded_tokens"] == lost * CHUNK
    assert record["miss"] == f"the load ended before chunk {lost}"
    assert reasons(rig) == [("lost", (6 - lost) * CHUNK, tier.name, ""), END]
    rig.settle()
    rig.reset()
    assert rig.ask(tokens, 2) == 6 * CHUNK, "what was computed instead was stored"
    rig.check()


def test_a_failed_synchronous_load_stores_nothing_of_what_it_spoilt(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens[:100])
    assert rig.side._lookups.client is not None
    # The lease of a synchronous load cannot fail by itself: break the slot's header.
    rig.side._lookups.client.pool.array(0, HEADER_BYTES)[:] = 0
    name = rig.add(tokens, 40)
    step = rig.step()
    assert step.sync_loads
    assert step.stores, "it would have stored what the forward made of garbage"
    rig.run()
    assert len(rig.answers[name]) == 40
    rig.settle()
    rig.reset()
    assert rig.node is not None
    client = rig.node.connect()
    client.clear([step.sync_loads[0].keys[0]])
    client.close()
    # What was stored later is read now, and the rig looks at every byte.
    rig.ask(tokens, 60)
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
def test_an_aborted_request_is_completed_once_and_leaves_nothing(
    make_rig: Make, pipelined: bool
) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), ranks=2, pipelined=pipelined)
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    waiting = rig.add(tokens)
    while not rig.side._loads:
        rig.step()
    rig.until(lambda: rig.num_leases() == 1)
    request = rig.scheduler.requests[waiting]
    rig.abort(waiting)
    rig.step()
    assert waiting in rig.scheduler.requests, "its blocks are still being written"
    rig.until(lambda: rig.num_leases() == 1)
    tier.opened.set()
    rig.run()
    assert rig.loaded == [waiting]
    assert request.request_id not in rig.scheduler.requests
    # aborted before it was scheduled, while it ran, and right after it was added
    for steps in (0, 1, 3):
        name = rig.add(prompt(100, seed=3 + steps), 20)
        for _ in range(steps):
            rig.step()
        rig.abort(name)
        rig.run()
    rig.check()


def test_request_finished_never_delays_a_free(make_rig: Make) -> None:
    rig = make_rig()
    answers = []
    real = rig.connector.request_finished_all_groups

    def watch(request: Any, block_ids: Any) -> Any:
        answers.append(real(request, block_ids))
        return answers[-1]

    rig.connector.request_finished_all_groups = watch  # type: ignore[method-assign]
    rig.ask(prompt(100), 3)
    rig.ask(prompt(100), 3)
    rig.abort(rig.add(prompt(50)))
    assert answers == [(False, None)] * 3
    rig.check()


# leases


@pytest.mark.parametrize("rest", [0, 5])
def test_what_vllm_has_itself_is_told_loaded_or_not(make_rig: Make, rest: int) -> None:
    rig = make_rig()
    tokens = prompt(4 * CHUNK + rest)
    rig.ask(tokens)
    rig.settle()
    for _ in range(2):
        rig.ask(tokens)
        told = rig.settle()["requests"][-1]
        own = (len(tokens) - 1) // BLOCK * BLOCK
        assert told["local_tokens"] == own
        computed = sum(one["tokens"] for one in told["reasons"])
        assert own + told["loaded_tokens"] + computed == len(tokens)


def test_leases_go_when_vllms_own_cache_covers_them_or_nothing_is_read(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    rig.ask(tokens)
    running = rig.add(tokens, 8)
    rig.step()
    rig.until(lambda: rig.num_leases() == 0)
    covered = rig.add(tokens, 8)
    while rig.scheduler.requests[covered].status == RequestStatus.WAITING:
        rig.step()
    rig.until(lambda: rig.num_leases() == 0)
    unread = rig.request(tokens, 8, name="unread")
    unread.skip_reading_prefix_cache = True
    rig.tokens["unread"], rig.prompts["unread"] = list(tokens), len(tokens)
    rig.answers["unread"] = []
    gate = rig.gate(p.Match)
    rig.scheduler.add_request(unread)
    while rig.scheduler.requests["unread"].status == RequestStatus.WAITING:
        rig.step()
    gate.open()
    rig.until(lambda: rig.step() is not None and rig.num_leases() == 0)
    rig.run()
    assert len(rig.answers[running]) == 8
    rig.check()


def test_leases_go_with_their_node(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    busy = rig.add(prompt(40, seed=1), 200)
    rig.step()
    names = [rig.add(tokens, 2) for _ in range(3)]
    rig.until(lambda: rig.num_leases() == 3)
    rig.stop_node()
    for _ in range(5):
        rig.step()
    rig.start_node()
    rig.run()
    assert [len(rig.answers[name]) for name in (busy, *names)] == [200, 2, 2, 2]
    rig.attach()
    rig.reset()
    rig.warm(tokens)
    assert rig.ask(tokens) > 0, "hits are back without another engine"
    rig.check()


def test_a_part_that_is_not_granted_is_released(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    request = rig.request(tokens, name="partly")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    whole = rig.state()["leases"]["bytes"]
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 14)),))
    rig.connector.update_state_after_alloc(request, blocks, 2 * CHUNK)
    (load,) = rig.side._next.sync_loads
    assert len(load.keys) == 2
    rig.until(lambda: rig.state()["leases"]["bytes"] == whole // 3)
    rig.side._end_load("partly", failed=False)
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    rig.side._next = StepMetadata()
    rig.check()


@pytest.mark.parametrize("busy", [False, True])
def test_a_load_that_is_granted_nothing_is_none(make_rig: Make, busy: bool) -> None:
    """vLLM cuts what it was offered for reasons of its own, down to nothing."""
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    if busy:
        rig.add(prompt(40, seed=1), 200)
        rig.step()
    request = rig.request(tokens, name="cut")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    offered, behind = rig.connector.get_num_new_matched_tokens(request, 0)
    assert (offered, rig.num_leases()) == (6 * CHUNK, 1)
    assert behind is busy
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 14)),))
    rig.connector.update_state_after_alloc(request, blocks, 0)
    rig.until(lambda: rig.num_leases() == 0)
    assert rig.side._next.sync_loads == rig.side._next.async_loads == []
    assert rig.side._loads == {}
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    rig.run()
    assert rig.ask(tokens) == 6 * CHUNK
    rig.check()


def test_look_ahead_is_bounded_and_everybody_gets_their_turn(make_rig: Make) -> None:
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    shared = [prompt(64, seed=i) for i in range(20)]
    rig.warm(*shared)
    names = [rig.add(tokens, 4) for tokens in shared]
    most = 0
    while rig.scheduler.has_requests():
        rig.step()
        most = max(most, rig.num_leases() - len(rig.side._loads))
    assert 0 < most <= LOOK_AHEAD
    assert [len(rig.answers[name]) for name in names] == [4] * 20
    assert rig.num_external >= 19 * 48, "nobody lost its hit by waiting"
    rig.check()


def test_a_request_is_not_planned_again_before_its_load_is_reported(make_rig: Make) -> None:
    """Preempted in between, it gets other blocks, and nobody would fill them."""
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    request = rig.request(tokens, name="early")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 14)),))
    rig.connector.update_state_after_alloc(request, blocks, 6 * CHUNK)
    assert rig.connector.get_num_new_matched_tokens(request, 0) == (None, False)
    rig.side._end_load("early", failed=False)
    rig.look_up(request)
    assert rig.connector.get_num_new_matched_tokens(request, 0)[0] == 6 * CHUNK
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    rig.side._next = StepMetadata()
    rig.check()


def test_running_requests_that_are_reset_are_right_afterwards(make_rig: Make) -> None:
    rig = make_rig(pipelined=True)
    tokens, other = prompt(200), prompt(60, seed=1)
    rig.warm(tokens, other)
    for _ in range(5):
        rig.add(tokens, 6)
        rig.step()
        rig.add(other, 6)
        with contextlib.suppress(RuntimeError):  # some blocks are freed a step later
            rig.scheduler.reset_prefix_cache(reset_running_requests=True)
        rig.run()
        assert rig.wrong() == []
        rig.settle()
    rig.check()


def test_requests_that_vllm_passes_over_do_not_keep_others_waiting(make_rig: Make) -> None:
    rig = make_rig(extra={"deadlines.request": "100ms"})
    tokens = [prompt(64, seed=i) for i in range(LOOK_AHEAD + 1)]
    rig.warm(*tokens)
    requests = [rig.request(each, name=f"n{i}") for i, each in enumerate(tokens)]
    for request in requests:
        rig.connector.on_new_request(request)
    for request in requests[:-1]:
        rig.look_up(request)
    begun = time.monotonic()
    assert rig.connector.get_num_new_matched_tokens(requests[-1], 0) == (None, False)
    rig.look_up(requests[-1])
    assert 0.05 < time.monotonic() - begun < 10
    for request in requests:
        request.status = RequestStatus.FINISHED_ABORTED
        rig.connector.request_finished(request, [])
    rig.check()


def test_vllm_is_told_where_tokens_came_from(make_rig: Make, tmp_path: Path) -> None:
    """Encoded objects in host memory are in host memory."""
    rig = make_rig(
        extra={
            "memory.capacity": "4MiB",
            "disk.path": str(tmp_path / "disk"),
            "disk.capacity": "8MiB",
        }
    )
    rig.warm(prompt(4 * CHUNK + 8))
    rig.reset()
    told: list[dict[str, int]] = []
    ask = rig.side.hit_sources
    rig.side.hit_sources = lambda *them: told.append(ask(*them)) or told[-1]  # type: ignore

    for cleared, source in ((["host"], "host"), (["host", "memory"], "disk"), ([], "host")):
        assert rig.node is not None
        client = rig.node.connect()
        client.flush()
        if cleared:
            client.clear(tiers=cleared)
        client.close()
        told.clear()
        assert rig.ask(prompt(4 * CHUNK + 8)) == 4 * CHUNK
        assert told == [{source: 4 * CHUNK}]
        rig.reset()
