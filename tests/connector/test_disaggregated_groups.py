"""Prefill in one engine, decode in another, for models with several layer groups."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.rig import Rig, prompt
from tests.connector.test_disaggregated import Pair, decode, params, prefill, record

from kvstrata.connectors.naming import prefill_elsewhere
from kvstrata.connectors.vllm import elsewhere
from kvstrata.testing.ports import HOST, free_port

Make = Callable[..., Rig]

ATTENTION = [
    ("full", "window"),
    ("window", "full", "long window"),
    ("full", "piece"),
    ("window",),
]
STATES = [("full", "state"), ("state",), ("state", "full", "window")]
KINDS = ATTENTION + STATES


def pair_of(make_rig: Make, kinds: tuple[str, ...], extra: Any = None, **options: Any) -> Pair:
    size = {"chunk_tokens": BLOCK if "state" in kinds else CHUNK, **(extra or {})}
    options = {"kinds": kinds, "num_blocks": 200, **options}
    first = make_rig(extra={"network.listen": "127.0.0.1:0", **size}, **options)
    second = make_rig(
        extra={"peer.named": "loopback", "peer.lookup_timeout": "1s", **size}, **options
    )
    assert second.node is not None
    backing = second.node.node.backings[0]
    second.until(lambda: backing.readable)
    return Pair(first, second)


def handed_over(kinds: tuple[str, ...], length: int) -> int:
    """Tokens of a prompt that need not be computed again."""
    if "state" in kinds:
        return (length - 1) // BLOCK * BLOCK
    whole = (length - 1) // CHUNK * CHUNK
    return length - 1 if length % CHUNK else whole


def peer_of(pair: Pair) -> dict[str, Any]:
    """As a proxy says it that asks both at once."""
    assert pair.prefill.node is not None
    return prefill_elsewhere(pair.prefill.node.node.address)


def not_here(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As it is said of a prompt that has been computed there; it is not waited for long."""
    monkeypatch.setattr(elsewhere, "WRITTEN_S", 0.2)
    said = peer_of(pair)
    return {**said, "kvstrata": {"peer": said["kvstrata"]["peer"]}}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("length", [2, 33, 64, 300])
def test_all_is_handed_over_but_what_has_to_be_computed(
    make_rig: Make, kinds: tuple[str, ...], length: int
) -> None:
    """Of attention all but the last token; of states what lies behind the last whole block."""
    pair = pair_of(make_rig, kinds)
    tokens, expected = prompt(length), handed_over(kinds, length)
    transfer = prefill(pair, tokens)
    pair.prefill.finish_stores()
    decode(pair, tokens, transfer, max_tokens=3)
    rig = pair.decode
    assert record(rig)["loaded_tokens"] == expected
    computed = sum(step.num_tokens for step in rig.steps)
    assert computed == length - expected + 2, "and two more that were sampled"
    assert rig.failed == []
    pair.settle()


@pytest.mark.parametrize("kinds", KINDS)
def test_loaded_while_it_is_computed(make_rig: Make, kinds: tuple[str, ...]) -> None:
    """In steps of 48 tokens, each of which is stored as it ends."""
    pair = pair_of(make_rig, kinds, max_num_batched_tokens=48)
    tokens, rig = prompt(333), pair.decode
    rig.add(tokens, **params(rig, peer_of(pair), 4))
    for _ in range(3):
        rig.step()
    assert rig.answers["r1"] == []
    computing = threading.Thread(target=prefill, args=(pair, tokens))
    computing.start()
    rig.run()
    computing.join()
    assert record(rig)["loaded_tokens"] == handed_over(kinds, 333)
    assert rig.failed == []
    pair.settle()


@pytest.mark.parametrize("kinds", [("full", "piece"), ("window",), ("state", "full", "window")])
def test_what_the_first_engine_finds_in_its_node_is_handed_over(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    pair = pair_of(make_rig, kinds)
    tokens = prompt(300)
    pair.prefill.warm(tokens)
    decode(pair, tokens, prefill(pair, tokens))
    assert record(pair.decode)["loaded_tokens"] == handed_over(kinds, 300)
    pair.settle()


@pytest.mark.parametrize("kinds", [*STATES, ("full", "piece")])
def test_what_vllm_has_itself_is_handed_over_though_its_node_has_lost_it(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    pair = pair_of(make_rig, kinds)
    tokens, rig = prompt(300), pair.prefill
    rig.ask(tokens)
    rig.settle()
    assert rig.node is not None
    client = rig.node.connect()
    client.clear()
    client.close()
    decode(pair, tokens, prefill(pair, tokens))
    assert record(pair.decode)["loaded_tokens"] == handed_over(kinds, 300)
    lender = rig.node.node.lender
    rig.until(lambda: lender.kept_bytes == 0)  # all of it was fetched
    pair.settle()


def test_a_state_that_is_found_is_kept_for_the_other_engine(make_rig: Make) -> None:
    pair = pair_of(make_rig, ("full", "state"))
    tokens, rig = prompt(5 * BLOCK + 3), pair.prefill
    rig.warm(tokens)
    prefill(pair, tokens)
    rig.settle()
    assert rig.node is not None
    node = rig.node.node
    kept = {
        (number, part)
        for number, key in enumerate(keys_of(rig, tokens))
        for part, slot in node.host.index.objects(key)
        if slot in node.lender._kept
    }
    assert kept == {(number, 0) for number in range(5)} | {(4, 1 << 16)}
    pair.settle()


def keys_of(rig: Rig, tokens: list[int]) -> list[bytes]:
    """Keys of a prompt's whole chunks."""
    request = rig.request(tokens, name="keys")
    rig.connector.on_new_request(request)
    state = rig.side._states["keys"]
    rig.look_up(request)
    keys = list(state.keys)
    rig.connector.request_finished_all_groups(request, tuple([] for _ in rig.groups.each))
    return keys


@pytest.mark.parametrize("kinds", [("window", "full", "long window"), ("full", "state")])
def test_the_rest_alone_comes_where_the_beginning_is_here(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    pair = pair_of(make_rig, kinds)
    tokens, rig = prompt(300), pair.decode
    rig.ask(tokens[: 4 * CHUNK + 1])
    rig.settle()
    decode(pair, tokens, prefill(pair, tokens))
    told = record(rig)
    assert told["local_tokens"] + told["loaded_tokens"] == handed_over(kinds, 300)
    assert told["local_tokens"] == 4 * CHUNK
    pair.settle()


@pytest.mark.parametrize("kinds", [("full", "window"), ("full", "state"), ("full", "piece")])
def test_prefill_that_ends_early_leaves_the_longest_boundary_there_is(
    make_rig: Make, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load fails as a whole; vLLM asks again, and what came is not lost."""
    pair = pair_of(make_rig, kinds)
    tokens, rig = prompt(300), pair.decode
    pair.prefill.ask(tokens[: 4 * CHUNK + 1])
    pair.prefill.settle()
    name = rig.add(tokens, **params(rig, not_here(pair, monkeypatch), 4))
    rig.run()
    assert rig.failed == [name]
    told = record(rig)
    assert told["loaded_tokens"] == 4 * CHUNK
    assert sum(one["tokens"] for one in told["reasons"]) == 300 - 4 * CHUNK
    assert len(rig.answers[name]) == 4
    pair.settle()


def test_prefill_that_never_comes_is_computed(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(make_rig, ("full", "window"))
    decode(pair, prompt(300), not_here(pair, monkeypatch))
    assert record(pair.decode)["loaded_tokens"] == 0
    assert len(pair.decode.failed) == 1
    pair.settle()


@pytest.mark.parametrize(
    ("length", "waited"), [(5 * CHUNK + 1, True), (5 * CHUNK + BLOCK, True), (5 * CHUNK, False)]
)
def test_only_an_end_is_waited_for_that_leaves_a_state(
    make_rig: Make, length: int, waited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block before the last token ends a chunk, or not: then nothing would come."""
    pair = pair_of(make_rig, ("full", "state"), {"chunk_tokens": CHUNK})
    rig = pair.decode
    name = rig.add(prompt(length), **params(rig, not_here(pair, monkeypatch), 2))
    rig.run()
    assert (rig.failed == [name]) is waited
    pair.settle()


def test_an_aborted_decode_leaves_nothing(make_rig: Make) -> None:
    pair = pair_of(make_rig, ("window", "full"))
    rig = pair.decode
    for seed in range(5):
        name = rig.add(prompt(200, seed), **params(rig, peer_of(pair), 4))
        rig.until(lambda: bool(rig.step()) and bool(rig.side._loads))
        rig.abort(name)
        rig.run()
    pair.settle()


@pytest.mark.parametrize("kinds", [("full", "window"), ("full", "state")])
def test_two_ranks(make_rig: Make, kinds: tuple[str, ...]) -> None:
    pair = pair_of(make_rig, kinds, ranks=2)
    tokens = prompt(167)
    decode(pair, tokens, prefill(pair, tokens))
    assert record(pair.decode)["loaded_tokens"] == handed_over(kinds, 167)
    pair.settle()


@pytest.mark.parametrize("kinds", [("window", "full", "long window"), ("state", "full", "window")])
def test_requests_while_nodes_die_at_random(make_rig: Make, kinds: tuple[str, ...]) -> None:
    """Either side's node, before, while or after a prompt is computed; nothing leaks."""
    draw = random.Random(7)
    address = f"{HOST}:{free_port()}"
    common: dict[str, Any] = {"deadlines.load": "500ms", "deadlines.attach": "2s"}
    common |= {"chunk_tokens": BLOCK if "state" in kinds else CHUNK}
    options: dict[str, Any] = {"kinds": kinds, "num_blocks": 200}
    first = make_rig(extra={"network.listen": address, **common}, **options)
    second = make_rig(
        extra={"peer.named": "loopback", "peer.lookup_timeout": "100ms", **common}, **options
    )
    pair = Pair(first, second)

    def kill(rig: Rig) -> None:
        if rig.node is not None:
            rig.node.check_integrity()
            rig.stop_node()

    for number in range(30):
        victim = draw.choice((first, second)) if number % 10 == 5 else None
        when = draw.choice(("before", "meanwhile", "between"))
        tokens = prompt(draw.randint(1, 6 * CHUNK), number)
        if victim is not None and when == "before":
            kill(victim)
        follows = draw.random() < 0.5
        said: dict[str, Any] | None = prefill_elsewhere(address)
        if not follows:
            said = prefill(pair, tokens)
        if victim is not None and when == "between":
            kill(victim)
        name = second.add(tokens, **params(second, said or {}, 2))
        for _ in range(draw.randint(0, 4)):
            second.step()
        if draw.random() < 0.1:
            second.abort(name)
        if victim is not None and when == "meanwhile":
            kill(victim)
        if follows:
            prefill(pair, tokens)
        second.run()
        assert (first.wrong(), second.wrong()) == ([], [])
        for rig in pair:
            if rig.node is None:
                rig.ask(prompt(2 * CHUNK, 1000 + number))  # so that it notices
                rig.start_node()
                rig.attach()
    assert second.num_external > 15 * CHUNK, "most came from the other node all the same"
    pair.settle()
