"""What a request's hints do in vLLM's scheduler, and what its record says of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.connector.fake_model import CHUNK
from tests.connector.rig import Rig, prompt
from tests.connector.test_disaggregated import Pair, decode, prefill
from tests.connector.test_disaggregated import pair as pair  # a fixture
from tests.connector.test_rotation import A, B, asked_again, restart, rig_of, warm
from vllm import SamplingParams

from kvstrata.wire.operator import Operator

Make = Callable[..., Rig]

LONG = 5 * CHUNK
ALL = {"hints": "all"}


def say(hints: Any, max_tokens: int = 1, **transfer: Any) -> dict[str, Any]:
    """Options of a request that says this."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True,
        extra_args={"kv_transfer_params": {**transfer, "kvstrata": hints}},
    )  # fmt: skip
    sampling.update_from_generation_config({}, 0)
    return {"sampling_params": sampling}


def last(rig: Rig) -> dict[str, Any]:
    """The record of the last request."""
    record: dict[str, Any] = rig.settle()["requests"][-1]
    return record


def stored(rig: Rig, tokens: list[int]) -> int:
    """Leading tokens that are loaded when nothing is said."""
    rig.settle()
    rig.reset()
    return rig.ask(tokens)


@pytest.mark.parametrize(("most", "loaded"), [(LONG, LONG), (3 * CHUNK - 1, 2 * CHUNK), (0, 0)])
def test_no_more_is_loaded_than_was_said(make_rig: Make, most: int, loaded: int) -> None:
    rig = make_rig()
    tokens = prompt(LONG + 5)
    rig.warm(tokens)
    assert rig.ask(tokens, **say({"max_load_tokens": most})) == loaded
    record = last(rig)
    assert record["hints"] == {"max_load_tokens": most}
    assert record["loaded_tokens"] == loaded
    assert record["miss"] == ("" if most == LONG else "left out by a hint")
    capped, end = ("capped", LONG - loaded, "hints"), ("not a whole chunk", 5, "")
    said = [(one["why"], one["tokens"], one.get("detail", "")) for one in record["reasons"]]
    assert said == ([capped, end] if loaded < LONG else [end])
    rig.check()


def test_who_does_not_want_to_load_asks_nobody_and_stores_all_the_same(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(LONG + 5)
    rig.warm(tokens[: 2 * CHUNK])
    before = rig.state()["counters"]["matches_total"]
    assert rig.ask(tokens, **say({"load": False})) == 0
    assert rig.settle()["counters"]["matches_total"] == before
    assert last(rig)["miss"] == "left out by a hint"
    assert stored(rig, tokens) == LONG
    rig.check()


@pytest.mark.parametrize(("most", "kept"), [(LONG, LONG), (3 * CHUNK - 1, 2 * CHUNK), (0, 0)])
def test_no_more_is_stored_than_was_said(make_rig: Make, most: int, kept: int) -> None:
    rig = make_rig()
    tokens = prompt(LONG + 5)
    rig.ask(tokens, **say({"max_store_tokens": most}))
    record = last(rig)
    assert record["stored_chunks"] == kept // CHUNK
    assert record["hints"] == {"max_store_tokens": most}
    assert stored(rig, tokens) == kept
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
def test_who_is_not_to_be_stored_leaves_nothing(make_rig: Make, pipelined: bool) -> None:
    rig = make_rig(pipelined=pipelined)
    tokens = prompt(3 * CHUNK)
    options = say({"store": False}, max_tokens=2 * CHUNK)
    assert rig.ask(tokens, 2 * CHUNK, **options) == 0
    held = rig.settle()["host"]
    assert (held["num_objects"], held["allocated_bytes"]) == (0, 0)
    assert last(rig)["stored_chunks"] == 0
    rig.check()


def test_nothing_is_kept_for_another_engine_either(make_rig: Make) -> None:
    rig = make_rig(extra={"network.listen": "127.0.0.1:0"})
    rig.ask(prompt(2 * CHUNK + 9), **say({"store": False}, do_remote_decode=True))
    assert rig.settle()["host"]["num_objects"] == 0
    rig.ask(prompt(2 * CHUNK + 9, 1), **say({"max_store_tokens": CHUNK}, do_remote_decode=True))
    assert rig.settle()["host"]["num_objects"] == 1
    rig.check()


def test_outputs_beyond_the_limit_are_not_stored(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(CHUNK)
    options = say({"max_store_tokens": 2 * CHUNK}, max_tokens=4 * CHUNK)
    rig.ask(tokens, 4 * CHUNK, **options)
    assert last(rig)["stored_chunks"] == 2
    rig.check()


def test_a_priority_and_tiers_reach_the_node(make_rig: Make, tmp_path: Path) -> None:
    disk = {"disk.path": str(tmp_path / "disk"), "disk.capacity": "8MiB"}
    rig = make_rig(extra={**ALL, **disk})
    assert rig.node is not None
    priority_of = rig.node.node.host.index.priority_of
    for seed, (hints, priority, on_disk) in enumerate([
        ({"priority": 2, "tiers": ["disk"]}, 2, 3),
        ({"priority": -1, "tiers": ["host"]}, -1, 0),
        ({}, 0, 3),
    ]):  # fmt: skip
        tokens = prompt(3 * CHUNK + 1, seed)
        name = rig.add(tokens, **say(hints))
        keys = list(rig.side._states[name].keys)
        rig.run()
        assert last(rig).get("hints", {}) == hints
        client = rig.node.connect()
        client.flush()
        assert [priority_of(key) for key in keys] == [priority] * 3
        client.clear(tiers=["host"])
        assert client.lookup(keys, [0]).count(1) == on_disk
        client.close()
    rig.check()


def test_what_is_loaded_comes_from_the_tiers_that_were_named(
    make_rig: Make, tmp_path: Path
) -> None:
    disk = {"disk.path": str(tmp_path / "disk"), "disk.capacity": "8MiB"}
    rig = make_rig(extra={**ALL, **disk})
    tokens = prompt(LONG + 5)
    rig.warm(tokens)
    rig.drop_host()
    assert rig.ask(tokens, **say({"tiers": ["host"], "store": False})) == 0
    capped = {"why": "capped", "tokens": LONG, "tier": "disk", "detail": "tiers"}
    assert capped.items() <= last(rig)["reasons"][0].items()
    rig.reset()
    assert rig.ask(tokens, **say({"tiers": ["host", "disk"]})) == LONG
    rig.check()


def test_a_tier_that_is_not_there_is_refused_and_the_rest_counts(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    tokens = prompt(LONG + 5)
    rig.ask(tokens, **say({"tiers": ["redis"], "session": "s", "max_store_tokens": CHUNK}))
    record = last(rig)
    assert record["hints"] == {"session": "s", "max_store_tokens": CHUNK}
    assert record["hints_refused"] == {"tiers": "the node has no tier redis"}
    assert stored(rig, tokens) == CHUNK
    rig.check()


def test_by_default_a_client_may_only_ask_for_less(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig()
    hints = {"session": "s", "pin": 60, "priority": 3, "tiers": ["host"], "x": 1, "store": False}
    for seed in range(20):
        rig.ask(prompt(CHUNK, seed), **say(hints))
        record = last(rig)
        assert record["hints"] == {"store": False}
        assert set(record["hints_refused"]) == {"session", "pin", "priority", "tiers", "x"}
        assert record["outcome"] == "length_capped"
    assert not [one for one in caplog.records if "hint" in one.getMessage()]
    assert rig.settle()["host"]["num_objects"] == 0
    rig.check()


def test_a_record_of_a_request_that_says_nothing_does_not_speak_of_hints(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    rig.ask(prompt(CHUNK))
    assert not {"hints", "hints_refused"} & last(rig).keys()
    rig.check()


def pins(rig: Rig) -> dict[str, tuple[bytes, int, int]]:
    """By name: whose each is, its chunks, and how many of them are kept."""
    rig.settle()
    assert rig.node is not None
    with contextlib.closing(rig.node.connect()) as client:
        found = list(Operator(client).pins())
    return {one.name: (one.owner, one.num_chunks, one.num_kept) for one in found}


def test_what_was_stored_and_hit_is_pinned_for_whom_it_is(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    tokens = prompt(LONG + 5)
    rig.ask(tokens[: 2 * CHUNK], cache_salt="a")
    name = rig.add(tokens, cache_salt="a", **say({"pin": 60}))
    owner = rig.side._states[name].owner
    rig.run()
    ((name, pinned),) = pins(rig).items()
    assert pinned == (owner, 5, 5)
    assert name.startswith("prompt ")
    rig.reset()
    assert rig.ask(tokens, cache_salt="b", **say({"pin": 60})) == 0, "it is another tenant's"
    assert sorted(count for _, count, _ in pins(rig).values()) == [5, 5]
    assert len({whose for whose, _, _ in pins(rig).values()}) == 2
    rig.check()


def test_a_session_has_one_pin_which_grows(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    tokens = prompt(LONG + 5)
    for chunks in (2, 4):
        rig.ask(tokens[: chunks * CHUNK], **say({"pin": 60, "session": "s"}))
        ((name, pinned),) = pins(rig).items()
        assert (name, pinned[1:]) == ("session s", (chunks, chunks))
    rig.check()


def test_a_pin_of_what_was_only_hit(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    tokens = prompt(LONG + 5)
    rig.warm(tokens)
    hints = {"pin": 60, "store": False, "max_load_tokens": 3 * CHUNK}
    assert rig.ask(tokens, **say(hints)) == 3 * CHUNK
    assert [pinned[1:] for pinned in pins(rig).values()] == [(3, 3)]
    rig.check()


@pytest.mark.parametrize("hints", [{"pin": 60, "store": False}, {"pin": 0}, {"session": "s"}, {}])
def test_nothing_is_pinned_unasked(make_rig: Make, hints: dict[str, Any]) -> None:
    rig = make_rig(extra=ALL)
    rig.ask(prompt(LONG), **say(hints))
    assert pins(rig) == {}
    rig.check()


def test_a_client_pins_nothing_by_default(make_rig: Make) -> None:
    rig = make_rig()
    rig.ask(prompt(LONG), **say({"pin": 60}))
    assert pins(rig) == {}
    assert set(last(rig)["hints_refused"]) == {"pin"}
    rig.check()


def test_what_is_pinned_outlives_what_is_not_and_the_quota_holds(make_rig: Make) -> None:
    rig = make_rig(extra={**ALL, "host.capacity": "1MiB"})
    kept, usual = prompt(LONG, 1), prompt(LONG, 2)
    rig.ask(kept, **say({"pin": 60}))
    rig.ask(usual)
    for seed in range(3, 60):
        rig.ask(prompt(LONG, seed), **say({"pin": 60}))
        rig.settle()
    held = pins(rig)
    most = rig.config.pins.per_tenant * (1 << 20)
    status = rig.settle()["host"]
    slot = status["allocated_bytes"] // status["num_objects"]
    assert sum(kept for _, _, kept in held.values()) * slot <= most
    assert stored(rig, kept) == LONG
    assert stored(rig, usual) == 0
    rig.check()


def test_no_hint_reaches_what_another_tenant_stored(make_rig: Make) -> None:
    rig = make_rig(extra=ALL)
    tokens = prompt(LONG + 5)
    rig.ask(tokens, cache_salt="a")
    rig.settle()
    rig.reset()
    peers = {"do_remote_prefill": True}
    everything = {"load": True, "tiers": ["host"], "session": "a", "priority": 3,
                  "owner": "a", "cache_salt": "a", "namespace": "a", "tenant": "a"}  # fmt: skip
    assert rig.ask(tokens, cache_salt="b", **say(everything, **peers)) == 0
    rig.reset()
    assert rig.ask(tokens, cache_salt="a", **say(everything)) == LONG
    rig.check()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pipelined", [False, True])
def test_random_hints_never_cost_an_answer(make_rig: Make, seed: int, pipelined: bool) -> None:
    draw = random.Random(seed)
    rig = make_rig(num_blocks=40, pipelined=pipelined, extra=ALL)
    for _ in range(4):
        for _ in range(6):
            tokens = prompt(draw.randrange(1, 6 * CHUNK), seed=draw.randrange(3))
            count = draw.randrange(1, 2 * CHUNK)
            choices: dict[str, list[Any]] = {
                "max_load_tokens": [0, 1, CHUNK, 2 * CHUNK + 7, 10**6, -1],
                "max_store_tokens": [0, CHUNK - 1, 2 * CHUNK, 10**6, "x"],
                "store": [True, False, None],
                "load": [True, False, 3],
                "priority": [-1, 0, 3, 99],
                "tiers": [["host"], ["redis"], []],
            }
            said = [name for name in choices if draw.random() < 0.4]
            hints = {name: draw.choice(choices[name]) for name in said}
            rig.add(tokens, count, **say(hints, max_tokens=count))
        for _ in range(draw.randrange(60)):
            rig.step()
    rig.run()
    rig.check()


def test_while_the_secret_changes_a_limit_holds_for_both(make_rig: Make) -> None:
    rig = rig_of(make_rig)
    tokens = prompt(LONG + 5)
    warm(rig, tokens)
    restart(rig, B, A)
    assert asked_again(rig, tokens, **say({"max_load_tokens": 2 * CHUNK, "store": False})) == (
        2 * CHUNK
    )
    assert asked_again(rig, tokens, **say({"store": False})) == LONG
    rig.check()


def test_a_prompt_s_end_is_within_the_limits_too(pair: Pair) -> None:
    tokens = prompt(2 * CHUNK + 9)
    limits = {"max_load_tokens": 2 * CHUNK + 8}
    for hints, came in ((limits, 2 * CHUNK), ({}, 2 * CHUNK + 9)):
        told = prefill(pair, tokens)
        assert told is not None
        told["kvstrata"].update(hints)
        decode(pair, tokens, told)
        assert last(pair.decode)["loaded_tokens"] == came
        pair.decode.settle()
        pair.decode.reset()
    pair.prefill.check()


@pytest.mark.parametrize("kinds", [("full", "window"), ("full", "state"), ("state",)])
@pytest.mark.parametrize(("most", "loaded"), [(LONG + 5, LONG), (3 * CHUNK + 1, 3 * CHUNK), (0, 0)])
def test_of_several_groups_the_longest_boundary_is_loaded_that_was_said(
    make_rig: Make, kinds: tuple[str, ...], most: int, loaded: int
) -> None:
    """A state is where a step ended, so these are as long as what may be loaded."""
    rig = make_rig(kinds=kinds, num_blocks=160, max_num_batched_tokens=CHUNK)
    tokens = prompt(LONG + 5)
    rig.warm(tokens)
    assert rig.ask(tokens, **say({"max_load_tokens": most})) == loaded
    assert last(rig)["loaded_tokens"] == loaded
    rig.check()
