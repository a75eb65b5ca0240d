"""Prefill in one engine, decode in another: what each does of it, inside vLLM's own scheduler."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from tests.connector.fake_model import CHUNK
from tests.connector.rig import Rig, prompt
from vllm import SamplingParams

from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER, prefill_elsewhere
from kvstrata.testing.ports import HOST, free_port


class Pair(NamedTuple):
    """An engine that computes prompts, and one that decodes them; a node each."""

    prefill: Rig
    decode: Rig

    def settle(self) -> None:
        for rig in self:
            rig.check()


@pytest.fixture
def pair(make_rig: Callable[..., Rig]) -> Pair:
    return pair_of(make_rig)


def pair_of(make_rig: Callable[..., Rig], **options: Any) -> Pair:
    prefill = make_rig(extra={"network.listen": "127.0.0.1:0"}, **options)
    decode = make_rig(extra={"peer.named": "loopback", "peer.lookup_timeout": "1s"}, **options)
    assert decode.node is not None
    backing = decode.node.node.backings[0]
    decode.until(lambda: backing.readable)
    return Pair(prefill, decode)


def params(rig: Rig, transfer: dict[str, Any], max_tokens: int = 1) -> dict[str, Any]:
    """Options of a request with these ``kv_transfer_params``."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True,
        extra_args={"kv_transfer_params": transfer},
    )  # fmt: skip
    sampling.update_from_generation_config({}, 0)
    return {"sampling_params": sampling}


def prefill(pair: Pair, tokens: list[int]) -> dict[str, Any] | None:
    """Compute a prompt for another engine; what that one is to be told, if it can be."""
    rig = pair.prefill
    said: list[Any] = []
    finished = rig.connector.request_finished_all_groups

    def hear(request: Any, block_ids: Any) -> Any:
        answer = finished(request, block_ids)
        said.append(answer)
        return answer

    rig.connector.request_finished_all_groups = hear  # type: ignore[method-assign]
    try:
        rig.add(tokens, **params(rig, dict(COMPUTE_FOR_ANOTHER)))
        rig.run()
    finally:
        rig.connector.request_finished_all_groups = finished  # type: ignore[method-assign]
    (answer,) = said
    assert answer[0] is False, "no block waits for anybody"
    return None if answer[1] is None else dict(answer[1])


def decode(
    pair: Pair, tokens: list[int], transfer: dict[str, Any] | None, max_tokens: int = 4
) -> int:
    """Go on with a prompt; how many of its tokens came from the other engine's node."""
    assert transfer is not None
    before = pair.decode.num_external
    pair.decode.add(tokens, **params(pair.decode, transfer, max_tokens))
    pair.decode.run()
    return pair.decode.num_external - before


def record(rig: Rig) -> dict[str, Any]:
    """Of the request that ended last."""
    return dict(rig.settle()["requests"][-1])


def test_what_one_engine_computed_another_goes_on_with(pair: Pair) -> None:
    tokens = prompt(10 * CHUNK)
    transfer = prefill(pair, tokens)
    assert transfer is not None
    assert transfer["do_remote_prefill"] is True
    assert transfer["remote_num_tokens"] == 10 * CHUNK
    assert decode(pair, tokens, transfer) == 10 * CHUNK
    told = record(pair.decode)
    assert (told["load"], told["peer"]) == ("async", transfer["kvstrata"]["peer"])
    pair.settle()


def test_a_request_that_nobody_goes_on_with_is_told_nothing(pair: Pair) -> None:
    rig = pair.prefill
    request = rig.request(prompt(3 * CHUNK))
    rig.connector.on_new_request(request)
    assert rig.connector.request_finished(request, []) == (False, None)
    rig.connector.on_new_request(request := rig.request(
        prompt(40), name="y", **params(rig, dict(COMPUTE_FOR_ANOTHER))
    ))  # fmt: skip
    assert rig.connector.request_finished(request, []) == (False, None), "it was aborted"


def test_what_is_found_is_kept_for_the_other_engine(pair: Pair) -> None:
    """A prompt that host memory has already may be evicted before the other engine comes."""
    tokens = prompt(5 * CHUNK)
    pair.prefill.warm(tokens)
    assert pair.prefill.node is not None
    lender = pair.prefill.node.node.lender
    assert lender.kept_bytes == 0
    prefill(pair, tokens)
    pair.prefill.settle()
    pair.prefill.until(lambda: lender.kept_bytes > 0)
    prefill(pair, tokens)
    pair.prefill.settle()
    assert len(lender._kept) == 5
    pair.settle()


def test_loaded_while_it_is_computed(pair: Pair) -> None:
    tokens = prompt(8 * CHUNK)
    assert pair.prefill.node is not None
    address = pair.prefill.node.node.address
    rig = pair.decode
    rig.add(tokens, **params(rig, prefill_elsewhere(address), 4))
    for _ in range(3):
        rig.step()
    assert rig.answers["r1"] == []
    computing = threading.Thread(target=prefill, args=(pair, tokens))
    computing.start()
    rig.run()
    computing.join()
    assert rig.num_external == 8 * CHUNK
    assert rig.cut == rig.failed == []
    pair.settle()


def test_prefill_that_never_comes_is_computed(make_rig: Callable[..., Rig]) -> None:
    first = make_rig(extra={"network.listen": "127.0.0.1:0"})
    second = make_rig(extra={"peer.named": "loopback", "deadlines.load": "300ms"})
    pair = Pair(first, second)
    assert first.node is not None
    begun = time.monotonic()
    decode(pair, prompt(6 * CHUNK), prefill_elsewhere(first.node.node.address))
    assert time.monotonic() - begun < 10.0
    assert record(second)["loaded_tokens"] == 0
    pair.settle()


def test_a_node_that_dies_meanwhile_costs_a_computation(pair: Pair) -> None:
    tokens = prompt(8 * CHUNK)
    assert pair.prefill.node is not None
    transfer = prefill_elsewhere(pair.prefill.node.node.address)
    pair.prefill.ask(tokens[: 3 * CHUNK])
    pair.prefill.settle()
    rig = pair.decode
    rig.add(tokens, **params(rig, transfer, 4))
    rig.until(lambda: bool(rig.step()) and bool(rig.side._loads))
    assert rig.node is not None
    host = rig.node.node.host
    rig.until(lambda: host.index.num_objects == 3)
    pair.prefill.stop_node()
    rig.run()
    assert record(rig)["loaded_tokens"] == 3 * CHUNK
    rig.check()
    pair.prefill.node = None


def test_a_peer_that_may_not_be_named_is_a_reason(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(extra={"peer.named": "loopback"})
    pair = Pair(rig, rig)
    assert decode(pair, prompt(3 * CHUNK), prefill_elsewhere("10.0.0.1:5")) == 0
    assert "10.0.0.1:5 may not be named here" in record(rig)["peer"]
    rig.check()


def test_a_node_that_answers_nobody_says_so_once(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig()
    for seed in range(2):
        rig.ask(prompt(3 * CHUNK, seed), **params(rig, dict(COMPUTE_FOR_ANOTHER)))
    assert caplog.text.count("set network.listen") == 1
    rig.check()


def test_an_aborted_decode_leaves_nothing(pair: Pair) -> None:
    rig = pair.decode
    assert pair.prefill.node is not None
    transfer = prefill_elsewhere(pair.prefill.node.node.address)
    for seed in range(5):
        name = rig.add(prompt(6 * CHUNK, seed), **params(rig, transfer, 4))
        rig.until(lambda: bool(rig.step()) and bool(rig.side._loads))
        rig.abort(name)
        rig.run()
    pair.settle()


@pytest.mark.parametrize("end", [1, 15, 16, 17, 31])
@pytest.mark.parametrize("chunks", [0, 1, 6])
def test_the_end_of_a_prompt_comes_too(pair: Pair, chunks: int, end: int) -> None:
    tokens = prompt(chunks * CHUNK + end)
    transfer = prefill(pair, tokens)
    rig = pair.decode
    decode(pair, tokens, transfer, max_tokens=3)
    if len(tokens) > 1:  # of which the only one has to be computed
        assert record(rig)["loaded_tokens"] == len(tokens)
    assert sum(step.num_tokens for step in rig.steps) == 3, "one token of the prompt was computed"
    pair.settle()


def test_the_end_alone_comes_where_the_rest_is_here(pair: Pair) -> None:
    tokens = prompt(4 * CHUNK + 20)
    rig = pair.decode
    rig.ask(tokens[: 4 * CHUNK])
    rig.settle()
    before = sum(step.num_tokens for step in rig.steps)
    decode(pair, tokens, prefill(pair, tokens), max_tokens=2)
    assert sum(step.num_tokens for step in rig.steps) - before == 2
    assert record(rig)["local_tokens"] == 4 * CHUNK
    assert record(rig)["loaded_tokens"] == 20
    pair.settle()


def test_the_end_of_a_prompt_may_be_lost(pair: Pair) -> None:
    tokens = prompt(3 * CHUNK + 20)
    transfer = prefill(pair, tokens)
    rig = pair.prefill
    rig.settle()
    assert rig.node is not None
    objects = rig.node.node.host.index
    assert objects.num_objects == 4
    state = rig.node.connect()
    other = rig.request(tokens, name="x", **params(rig, dict(COMPUTE_FOR_ANOTHER)))
    rig.connector.on_new_request(other)
    end = rig.side._states["x"].tail
    rig.connector.request_finished(other, [])
    assert state.clear([end]) == 1
    state.close()
    decode(pair, tokens, transfer)
    assert record(pair.decode)["loaded_tokens"] == 3 * CHUNK
    pair.settle()


def test_nothing_is_stored_of_an_end_that_goes_on(pair: Pair) -> None:
    """Its block is written on while it would be copied."""
    rig = pair.prefill
    rig.ask(prompt(2 * CHUNK + 20), **params(rig, dict(COMPUTE_FOR_ANOTHER), max_tokens=3))
    rig.settle()
    assert rig.node is not None
    assert rig.node.node.host.index.num_objects == 2
    rig.check()


def test_two_ranks(make_rig: Callable[..., Rig]) -> None:
    first = make_rig(ranks=2, extra={"network.listen": "127.0.0.1:0"})
    second = make_rig(ranks=2, extra={"peer.named": "loopback", "peer.lookup_timeout": "1s"})
    pair = Pair(first, second)
    tokens = prompt(5 * CHUNK + 7)
    decode(pair, tokens, prefill(pair, tokens))
    assert record(second)["loaded_tokens"] == len(tokens)
    pair.settle()


def test_with_a_disk_below(make_rig: Callable[..., Rig], tmp_path: Any) -> None:
    """An end without marks goes no further than host memory: nobody could find it elsewhere."""
    disk = {"disk.path": str(tmp_path / "disk"), "disk.capacity": "8MiB", "disk.codec": "lossless"}
    first = make_rig(extra={"network.listen": "127.0.0.1:0", **disk})
    second = make_rig(extra={"peer.named": "loopback", "peer.lookup_timeout": "1s"})
    pair = Pair(first, second)
    tokens = prompt(5 * CHUNK + 7)
    transfer = prefill(pair, tokens)
    first.settle()
    assert first.node is not None
    client = first.node.connect()
    client.flush()
    client.close()
    assert len(list((tmp_path / "disk" / "objects").rglob("*.kvo"))) == 5
    decode(pair, tokens, transfer)
    assert record(second)["loaded_tokens"] == len(tokens)
    pair.settle()


def test_200_requests_while_nodes_die_at_random(make_rig: Callable[..., Rig]) -> None:
    """Either side's node, before, while or after a prompt is computed; nothing leaks."""
    draw = random.Random(5)
    address = f"{HOST}:{free_port()}"
    common = {"deadlines.load": "500ms", "deadlines.attach": "2s"}
    first = make_rig(extra={"network.listen": address, **common})
    second = make_rig(extra={"peer.named": "loopback", "peer.lookup_timeout": "100ms", **common})
    pair, loaded = Pair(first, second), 0

    def kill(rig: Rig) -> None:
        if rig.node is not None:
            rig.node.check_integrity()
            rig.stop_node()

    for number in range(200):
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
        transfer = {} if said is None else said
        name = second.add(tokens, **params(second, transfer, 2))
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
                rig.start_node()
                rig.attach()
    loaded = second.num_external
    assert loaded > 100 * CHUNK, "most came from the other node all the same"
    pair.settle()
