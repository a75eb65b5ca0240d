"""Each rule of a request's life in vLLM, inside vLLM's own scheduler, on a real node."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.rig import (
    BLOCK,
    CHUNK,
    GatedTier,
    Rig,
    kv_cache_config,
    prompt,
    tiered,
    vllm_config,
)
from vllm import PoolingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, SupportsHMA
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import RequestStatus

from kvstrata.connectors.vllm import connector as connector_module
from kvstrata.connectors.vllm import scheduler as scheduler_module
from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.messages import StepMetadata, WorkerHello
from kvstrata.errors import ConfigError
from kvstrata.node import protocol as p
from kvstrata.objects import HEADER_BYTES

Make = Callable[..., Rig]


def warm(rig: Rig, *prompts: list[int], max_tokens: int = 1) -> None:
    """Have the node know these prompts, and vLLM none of them."""
    for tokens in prompts:
        rig.ask(tokens, max_tokens)
    rig.settle()
    rig.reset()


def right(rig: Rig) -> None:
    """No answer is wrong, nothing is held, no block has leaked."""
    assert rig.wrong() == []
    rig.settle()
    rig.reset()
    assert rig.side._states == {}
    assert not rig.side._loads
    assert not rig.side._loading_chunks
    assert rig.side._active == rig.side._looking == set()


def leases(rig: Rig) -> int:
    count: int = rig.state()["leases"]["count"]
    return count


# how a request is loaded


@pytest.mark.parametrize("length", [32, 64, 200, 256, 257])
def test_when_idle_a_load_is_synchronous_and_leaves_one_token(make_rig: Make, length: int) -> None:
    rig = make_rig()
    tokens = prompt(length)
    warm(rig, tokens)
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
    right(rig)


def test_beside_others_a_load_is_asynchronous_and_may_be_the_whole_prompt(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(256)
    warm(rig, tokens)
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
    right(rig)


def test_what_is_still_arriving_is_never_loaded_synchronously(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens = prompt(200)
    warm(rig, tokens)
    drop_host(rig)
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
    right(rig)


def drop_host(rig: Rig) -> None:
    """Only the slower tier has what was stored."""
    assert rig.node is not None
    client = rig.node.connect()
    client.flush()
    client.clear(tiers=["host"])
    client.close()


def test_without_all_workers_on_the_node_no_load_is_synchronous(make_rig: Make) -> None:
    rig = make_rig(ranks=2)
    tokens = prompt(200)
    warm(rig, tokens)
    assert rig.side._client is not None
    rig.side._worker_nodes = {rig.side._client.hello.node, b""}
    rig.add(tokens)
    assert rig.step().sync_loads == []
    rig.run()
    right(rig)


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
    right(rig)


def test_a_chunk_is_loaded_once_for_two_requests(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier))
    tokens = prompt(200)
    warm(rig, tokens)
    drop_host(rig)
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
    right(rig)


def test_the_second_request_goes_on_when_the_firsts_load_fails(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), extra={"deadlines.load": "100ms"})
    tokens = prompt(200)
    warm(rig, tokens)
    drop_host(rig)
    tier.opened.clear()
    names = rig.add(tokens, 2), rig.add(tokens, 2)
    rig.run()
    assert rig.failed[:1] == [names[0]]
    assert [len(rig.answers[name]) for name in names] == [2, 2]
    tier.opened.set()
    right(rig)


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
    right(rig)


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
    right(rig)


def test_a_match_past_its_deadline_is_a_miss_and_its_late_lease_goes_back(make_rig: Make) -> None:
    rig = make_rig(extra={"deadlines.match": "2ms", "deadlines.request": "1s"})
    tokens = prompt(200)
    warm(rig, tokens)
    gate = rig.gate(p.Match)
    assert rig.ask(tokens) == 0
    assert rig.state()["requests"][-1]["miss"] == "the match missed its deadline"
    gate.open()
    rig.reset()
    assert rig.ask(tokens) > 0, rig.state()["requests"][-1]
    right(rig)


# what fails


def test_a_failed_load_is_remembered_and_recomputed(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), extra={"deadlines.load": "100ms"})
    tokens = prompt(200)
    warm(rig, tokens)
    drop_host(rig)
    tier.opened.clear()
    name = rig.add(tokens, 2)
    while not rig.failed:
        rig.step()
    request = rig.scheduler.requests[name]
    assert rig.connector.get_num_new_matched_tokens(request, 0) == (0, False)
    rig.run()
    assert rig.failed == rig.loaded == [name]
    assert rig.state()["requests"][-1]["miss"] == "the load failed"
    tier.opened.set()
    right(rig)


def test_a_failed_synchronous_load_stores_nothing_of_what_it_spoilt(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    warm(rig, tokens[:100])
    assert rig.side._client is not None
    # The lease of a synchronous load cannot fail by itself: break the slot's header.
    rig.side._client.pool.array(0, HEADER_BYTES)[:] = 0
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
    right(rig)


@pytest.mark.parametrize("pipelined", [False, True])
def test_an_aborted_request_is_completed_once_and_leaves_nothing(
    make_rig: Make, pipelined: bool
) -> None:
    tier = GatedTier()
    rig = make_rig(make_node=tiered(tier), ranks=2, pipelined=pipelined)
    tokens = prompt(200)
    warm(rig, tokens)
    drop_host(rig)
    tier.opened.clear()
    waiting = rig.add(tokens)
    while not rig.side._loads:
        rig.step()
    rig.until(lambda: leases(rig) == 1)
    request = rig.scheduler.requests[waiting]
    rig.abort(waiting)
    rig.step()
    assert waiting in rig.scheduler.requests, "its blocks are still being written"
    rig.until(lambda: leases(rig) == 1)
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
    right(rig)


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
    right(rig)


# leases


def test_leases_go_when_vllms_own_cache_covers_them_or_nothing_is_read(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    warm(rig, tokens)
    rig.ask(tokens)
    running = rig.add(tokens, 8)
    rig.step()
    rig.until(lambda: leases(rig) == 0)
    covered = rig.add(tokens, 8)
    while rig.scheduler.requests[covered].status == RequestStatus.WAITING:
        rig.step()
    rig.until(lambda: leases(rig) == 0)
    unread = rig.request(tokens, 8, name="unread")
    unread.skip_reading_prefix_cache = True
    rig.tokens["unread"], rig.prompts["unread"] = list(tokens), len(tokens)
    rig.answers["unread"] = []
    gate = rig.gate(p.Match)
    rig.scheduler.add_request(unread)
    while rig.scheduler.requests["unread"].status == RequestStatus.WAITING:
        rig.step()
    gate.open()
    rig.until(lambda: rig.step() is not None and leases(rig) == 0)
    rig.run()
    assert len(rig.answers[running]) == 8
    right(rig)


def test_leases_go_with_their_node(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    warm(rig, tokens)
    busy = rig.add(prompt(40, seed=1), 200)
    rig.step()
    names = [rig.add(tokens, 2) for _ in range(3)]
    rig.until(lambda: leases(rig) == 3)
    rig.stop_node()
    for _ in range(5):
        rig.step()
    rig.start_node()
    rig.run()
    assert [len(rig.answers[name]) for name in (busy, *names)] == [200, 2, 2, 2]
    rig.attach()
    rig.reset()
    warm(rig, tokens)
    assert rig.ask(tokens) > 0, "hits are back without another engine"
    right(rig)


def test_a_part_that_is_not_granted_is_released(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    warm(rig, tokens)
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
    right(rig)


def test_look_ahead_is_bounded_and_everybody_gets_their_turn(make_rig: Make) -> None:
    rig = make_rig(num_blocks=40, max_num_seqs=2)
    shared = [prompt(64, seed=i) for i in range(20)]
    warm(rig, *shared)
    names = [rig.add(tokens, 4) for tokens in shared]
    most = 0
    while rig.scheduler.has_requests():
        rig.step()
        most = max(most, leases(rig) - len(rig.side._loads))
    assert 0 < most <= scheduler_module.LOOK_AHEAD
    assert [len(rig.answers[name]) for name in names] == [4] * 20
    assert rig.num_external >= 19 * 48, "nobody lost its hit by waiting"
    right(rig)


# keys that change


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_preempted_request_finds_its_own_outputs_again(make_rig: Make, pipelined: bool) -> None:
    rig = make_rig(num_blocks=14, pipelined=pipelined)
    names = [rig.add(prompt(64, seed=i), 100) for i in range(3)]
    rig.run()
    assert [len(rig.answers[name]) for name in names] == [100] * 3
    assert any(r["loaded_tokens"] > 64 for r in rig.state()["requests"]), "outputs were loaded"
    right(rig)


def test_a_session_that_rewrites_tokens_is_hashed_again(make_rig: Make) -> None:
    rig = make_rig()
    request = rig.request(prompt(64), 4, name="session", resumable=True)
    rig.connector.on_new_request(request)
    state = rig.side._states["session"]
    before = list(state.keys)
    request._all_token_ids[40] += 1
    assert state.rehash(), "same length, other tokens"
    assert state.keys[0] == before[0]
    assert state.keys[1] != before[1]
    request._all_token_ids[3] += 1
    rig.look_up(request)
    assert state.keys[0] != before[0]
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    right(rig)


def test_growing_keys_are_those_of_the_whole(make_rig: Make) -> None:
    rig = make_rig()
    media = [feature("a", 20, 30), feature("b", 100, 40)]
    grown = rig.request(prompt(70), 200, name="grown", mm_features=media)
    rig.connector.on_new_request(grown)
    state = rig.side._states["grown"]
    rest = prompt(160)[70:]
    for token in rest:
        grown.append_output_token_ids(token)
        state.rehash()
    whole = rig.request(prompt(160), name="whole", mm_features=media)
    rig.connector.on_new_request(whole)
    assert state.keys == rig.side._states["whole"].keys
    for request in (grown, whole):
        request.status = RequestStatus.FINISHED_ABORTED
        rig.connector.request_finished(request, [])
    right(rig)


def feature(identifier: str | None, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


def keys_of(rig: Rig, **options: Any) -> list[bytes]:
    request = rig.request(prompt(128), name="keys", **options)
    rig.connector.on_new_request(request)
    state = rig.side._states["keys"]
    rig.look_up(request)
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    return [] if state.bypass else state.keys


def test_media_and_salt_are_part_of_the_key(make_rig: Make) -> None:
    rig = make_rig()
    plain = keys_of(rig)
    cat = keys_of(rig, mm_features=[feature("cat", 40, 8)])
    dog = keys_of(rig, mm_features=[feature("dog", 40, 8)])
    moved = keys_of(rig, mm_features=[feature("cat", 41, 8)])
    assert plain[0] == cat[0] == dog[0] == moved[0], "before the picture all are alike"
    assert len({keys[1] for keys in (plain, cat, dog, moved)}) == 4
    salts = [keys_of(rig, cache_salt=salt)[0] for salt in ("x", "y")]
    assert len({plain[0], *salts}) == 3


def test_what_has_no_identity_goes_past_the_cache(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    rig = make_rig()
    embeds = torch.zeros(64, 8)
    bypassed: dict[str, Any] = {
        "prompt embeddings have no token ids": {"prompt_embeds": embeds},
        "pooling requests are not cached": {
            "pooling_params": PoolingParams(task="embed"), "sampling_params": None,
        },
        "a multimodal item has no identifier": {
            "mm_features": [feature(None, 3, 4)], "block_hasher": None,
        },
        "an adapter that is reloaded in place has no lasting identity": {
            "lora_request": LoRARequest("l", 1, "/nowhere", load_inplace=True),
        },
        # user text that no key can be made of must not end the engine
        "an identity is missing": {"cache_salt": "\ud800"},
        "an identity is missing: ": {"lora_request": LoRARequest("l", 2, "/nowhere")},
    }  # fmt: skip
    for why, options in bypassed.items():
        tokens = None if "prompt_embeds" in options else prompt(64)
        request = rig.request(tokens, name=why, **options)
        rig.connector.on_new_request(request)
        state = rig.side._states[why]
        rig.look_up(request)
        assert rig.connector.get_num_new_matched_tokens(request, 0) == (0, False)
        assert state.bypass.startswith(why.rstrip(": ")), state.bypass
        assert state.keys == []
        request.status = RequestStatus.FINISHED_ABORTED
        rig.connector.request_finished(request, [])
    right(rig)


def test_an_adapter_is_waited_for_until_its_identity_is_known(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    known: list[bytes | None] = [None]
    monkeypatch.setattr(rig.side._namespaces, "of", lambda request: known[0])
    request = rig.request(prompt(64), lora_request=LoRARequest("l", 1, "/x"))
    rig.connector.on_new_request(request)
    assert rig.connector.get_num_new_matched_tokens(request, 0) == (None, False)
    known[0] = bytes(range(32))
    rig.until(lambda: rig.connector.get_num_new_matched_tokens(request, 0) == (0, False))
    assert rig.side._states["x"].namespace == known[0]
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    right(rig)


# what is stored


def test_placeholders_and_drafts_are_not_stored(make_rig: Make) -> None:
    rig = make_rig()
    request = rig.request(prompt(CHUNK - 1), 50, name="drafting")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    assert rig.side._attached() is not None

    def stores(computed: int, count: int) -> list[Any]:
        request.num_computed_tokens = computed
        output = SimpleNamespace(
            total_num_scheduled_tokens=count,
            num_scheduled_tokens={"drafting": count},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ([1, 2, 3, 4],)),
            new_block_ids_to_zero=None,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
            kv_cache_block_copies=None,
        )
        meta: Any = rig.connector.build_connector_meta(output)
        return list(meta.stores)

    # 31 tokens are known; the step computes them and three that are only guessed.
    assert stores(0, CHUNK + 2) == []
    request.append_output_token_ids(7)
    assert stores(CHUNK - 1, 4)[0].blocks == [1, 2]
    assert stores(CHUNK, 4) == [], "once"
    request.num_computed_tokens = 0
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    right(rig)


@pytest.mark.parametrize("pipelined", [False, True])
def test_what_fills_up_in_decode_is_stored_for_the_next_turn(
    make_rig: Make, pipelined: bool
) -> None:
    rig = make_rig(pipelined=pipelined)
    history = prompt(50)
    for _ in range(6):
        name = rig.add(history, 45)
        rig.run()
        history = rig.tokens[name] + prompt(7)
        rig.settle()
        rig.reset()
    grown = rig.state()["requests"][-1]
    # All whole chunks of the last turn but for the last answer token, which was never computed.
    assert grown["loaded_tokens"] // CHUNK == (grown["prompt_tokens"] - 8) // CHUNK
    right(rig)


def test_the_last_chunk_is_stored_although_its_request_has_ended(make_rig: Make) -> None:
    rig = make_rig(pipelined=True)
    tokens = prompt(60)
    name = rig.add(tokens, 5)
    while rig.scheduler.requests:
        rig.step()
    late = [store for step in rig.steps for store in (*step.stores, *step.late_stores)]
    rig.run()
    rig.settle()
    assert sum(len(store.prefix) - store.first for store in late) <= 2
    rig.reset()
    assert rig.ask(rig.tokens[name][:65]) == 64
    right(rig)


# what the connector says of itself


def test_it_mends_the_failure_policy_and_warns_of_other_versions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transfer = SimpleNamespace(kv_load_failure_policy="fail")
    connector_module._greet(transfer, "")
    assert transfer.kv_load_failure_policy == "recompute"
    assert "recompute" in caplog.text
    caplog.clear()
    connector_module._greet(transfer, "")
    assert caplog.text == ""
    monkeypatch.setattr("vllm.__version__", "9.9.9")
    connector_module._greet(transfer, "")
    assert "9.9.9" in caplog.text
    assert "0.32.0" in caplog.text


def test_vllm_sees_the_mended_policy(make_rig: Make) -> None:
    assert make_rig().scheduler.recompute_kv_load_failures is True


def test_several_groups_are_left_alone_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    for groups, why in ((2, "2 KV cache groups"), (1, "not causal")):
        caplog.clear()
        caches = kv_cache_config(64, groups)
        if groups == 1:
            spec = caches.kv_cache_groups[0].kv_cache_spec
            object.__setattr__(spec, "non_causal", True)
        config = vllm_config({}, 64)
        connector = KVStrataConnector(config, KVConnectorRole.SCHEDULER, caches)
        assert why in caplog.text
        request: Any = SimpleNamespace(request_id="r")
        connector.on_new_request(request)
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
        connector.update_state_after_alloc(request, None, 0)
        meta: Any = connector.build_connector_meta(SimpleNamespace())
        assert (meta.stores, meta.async_loads, meta.sync_loads) == ([], [], [])
        assert connector.request_finished_all_groups(request, ([], [])) == (False, None)
        assert connector.reset_cache() is None
        worker = KVStrataConnector(config, KVConnectorRole.WORKER, caches)
        worker.register_kv_caches({})
        hello: Any = worker.get_handshake_metadata()
        assert hello.problem
        worker.bind_connector_metadata(meta)
        worker.handle_preemptions(meta)
        worker.start_load_kv(None)
        worker.wait_for_save()
        assert worker.get_transfer_results(set()).finished_recving in (None, set())
        connector.shutdown()
        worker.shutdown()


def test_it_keeps_the_hybrid_manager_and_delivers_nothing_for_sure(make_rig: Make) -> None:
    assert issubclass(KVStrataConnector, SupportsHMA)
    assert make_rig().connector.requires_kv_delivery is False


@pytest.mark.parametrize(
    ("hellos", "why"),
    [
        ([WorkerHello(problem="an order nobody knows")], "an order nobody knows"),
        ([WorkerHello(order="a"), WorkerHello(order="b")], "different orders"),
    ],
)
def test_workers_that_cannot_take_part_turn_it_off(
    make_rig: Make, hellos: list[WorkerHello], why: str
) -> None:
    rig = make_rig()
    rig.side.introduce({(0, i): hello for i, hello in enumerate(hellos)})
    assert rig.ask(prompt(100), 3) == 0
    record = rig.state()["requests"][-1]
    assert why in record["miss"]
    assert record["stored_chunks"] == 0
    right(rig)


def test_a_model_without_identity_is_not_cached(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()

    def unknown(layout: str, wait_s: float) -> None:
        raise ValueError("a model of no kind")

    monkeypatch.setattr(rig.side._namespaces, "identify", unknown)
    rig.side.introduce({(0, 0): WorkerHello(order="x")})
    assert rig.ask(prompt(100), 3) == 0
    right(rig)


@pytest.mark.parametrize(
    ("configured", "block", "chunk"), [(None, 16, 128), (None, 48, 144), (96, 48, 96), (64, 16, 64)]
)
def test_a_chunk_is_a_whole_number_of_blocks(
    configured: int | None, block: int, chunk: int
) -> None:
    from kvstrata.config import load_config

    overrides = {} if configured is None else {"chunk_tokens": configured}
    config = load_config(environ={}, overrides=overrides)
    assert connector_module._chunk_tokens(config, block) == chunk


def test_a_chunk_that_cuts_a_block_is_refused() -> None:
    from kvstrata.config import load_config

    config = load_config(environ={}, overrides={"chunk_tokens": 64})
    with pytest.raises(ConfigError, match="no multiple of the engine's blocks of 48"):
        connector_module._chunk_tokens(config, 48)


def test_resetting_the_cache_forgets_what_was_stored(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    warm(rig, tokens)
    running = rig.add(tokens, 20)
    rig.step()
    assert rig.connector.reset_cache() is True
    rig.run()
    assert len(rig.answers[running]) == 20
    rig.reset()
    assert rig.ask(tokens) == 0
    rig.settle()
    rig.reset()
    assert rig.ask(tokens) > 0
    right(rig)


# everything at once


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_random_histories_never_read_a_wrong_byte(
    make_rig: Make, ranks: int, pipelined: bool
) -> None:
    """Few blocks, few slots, shared prefixes, aborts, a slow tier, a node that comes and goes."""
    for seed in range(4):
        chance = random.Random(seed)
        tier = GatedTier()
        rig = make_rig(
            num_blocks=chance.choice([24, 40, 64]),
            ranks=ranks,
            pipelined=pipelined,
            make_node=tiered(tier) if seed % 2 else None,
            max_num_seqs=chance.choice([2, 4, 8]),
            max_num_batched_tokens=chance.choice([48, 256]),
            extra={"host.capacity": "1MiB", "deadlines.load": "300ms", "deadlines.match": "2ms",
                   "deadlines.request": "20ms"},
        )  # fmt: skip
        alive: list[str] = []
        wanted: dict[str, int] = {}
        for _ in range(250):
            action = chance.random()
            if action < 0.25:
                base = prompt(200, seed=chance.randrange(4))[: chance.randrange(1, 200)]
                count = chance.randrange(1, 60)
                name = rig.add(base, count)
                alive.append(name)
                wanted[name] = count
            elif action < 0.3 and alive:
                name = alive.pop(chance.randrange(len(alive)))
                rig.abort(name)
                wanted.pop(name)
            elif action < 0.32:
                tier.opened.clear()
            elif action < 0.36:
                tier.opened.set()
            elif action < 0.37 and not seed % 2:
                rig.stop_node()
                rig.start_node()
            elif action < 0.4:
                rig.scheduler.reset_prefix_cache()
            else:
                rig.step()
        rig.run()
        tier.opened.set()
        assert all(len(rig.answers[name]) == count for name, count in wanted.items())
        right(rig)
