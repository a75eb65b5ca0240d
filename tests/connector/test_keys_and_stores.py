"""Which tokens get which key, and what of a request is stored; and random histories of it all."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.fake_model import CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import (
    Rig,
    prompt,
)
from vllm import PoolingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import RequestStatus

from kvstrata.keys import Namespace

Make = Callable[..., Rig]


# keys that change


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_preempted_request_finds_its_own_outputs_again(make_rig: Make, pipelined: bool) -> None:
    rig = make_rig(num_blocks=14, pipelined=pipelined)
    names = [rig.add(prompt(64, seed=i), 100) for i in range(3)]
    while rig.scheduler.has_requests():
        rig.step()
        # A request may be preempted right after its outputs were handed over to be stored.
        rig.finish_stores()
    rig.run()
    assert [len(rig.answers[name]) for name in names] == [100] * 3
    assert any(r["loaded_tokens"] > 64 for r in rig.state()["requests"]), "outputs were loaded"
    rig.check()


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
    rig.check()


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
    rig.check()


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
    rig.check()


def test_an_adapter_is_waited_for_until_its_identity_is_known(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    known: list[Namespace | None] = [None]
    monkeypatch.setattr(rig.side._lookups.namespaces, "parts_of", lambda request: known[0])
    request = rig.request(prompt(64), lora_request=LoRARequest("l", 1, "/x"))
    rig.connector.on_new_request(request)
    assert rig.connector.get_num_new_matched_tokens(request, 0) == (None, False)
    namespace = known[0] = Namespace("m", "l", 64, adapter="7a")
    rig.until(lambda: rig.connector.get_num_new_matched_tokens(request, 0) == (0, False))
    assert rig.side._states["x"].namespace == namespace.digest()
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    rig.check()


# what is stored


def test_placeholders_and_drafts_are_not_stored(make_rig: Make) -> None:
    rig = make_rig()
    request = rig.request(prompt(CHUNK - 1), 50, name="drafting")
    rig.connector.on_new_request(request)
    rig.look_up(request)
    assert rig.side._lookups.attached() is not None

    def stores(computed: int, count: int) -> list[Any]:
        request.num_computed_tokens = computed
        output = SimpleNamespace(
            total_num_scheduled_tokens=count,
            num_scheduled_tokens={"drafting": count},
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda _: ([1, 2, 3, 4],), boundary_state_offloads={}
            ),
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
    rig.check()


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
    rig.check()


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
    rig.check()


# everything at once


@pytest.mark.parametrize(
    ("ranks", "pipelined", "ends"),
    [
        (1, False, "at once"),
        (1, True, "late"),
        (2, False, "late"),
        (2, True, "at once"),
        (2, True, "never"),
    ],
)
def test_random_histories_never_read_a_wrong_byte(
    make_rig: Make, ranks: int, pipelined: bool, ends: str
) -> None:
    """Few blocks, few slots, shared prefixes, aborts, a slow tier, a node that comes and goes."""
    for seed in range(4):
        chance = random.Random(seed)
        tier = GatedTier()
        rig = make_rig(
            num_blocks=chance.choice([24, 40, 64]),
            ranks=ranks,
            pipelined=pipelined,
            ends=ends,
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
        rig.check()
