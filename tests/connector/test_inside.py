"""What a prompt parts from inside it, in vLLM's own scheduler: found, loaded, and right."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from tests.connector.fake_model import BLOCK, CHUNK, LAYERS, WORD, digests
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_rotation import as_portable, state_of

from kvstrata.connectors.vllm.messages import Store
from kvstrata.objects import HEADER_BYTES, verify_object
from kvstrata.parts import PORTABLE, identity
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

Make = Callable[..., Rig]
ON = {"inside": "on"}


def record(rig: Rig) -> dict[str, Any]:
    """Of the request that ended last."""
    return dict(rig.settle()["requests"][-1])


def in_common(these: Sequence[int], those: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    pairs = zip(these, those, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def left_by(tokens: Sequence[int]) -> list[range]:
    """What a request that ended with KV of these tokens leaves: chunks, and a tail of 16 and up."""
    ranges = [range(start, min(start + CHUNK, len(tokens))) for start in
              range(0, len(tokens), CHUNK)]  # fmt: skip
    return [one for one in ranges if len(one) >= 16]


def loadable(stored: Sequence[int], asked: Sequence[int]) -> int:
    """Tokens that are loaded of a prompt after one that left KV of these tokens."""
    common, found = in_common(stored, asked), 0
    for one in left_by(stored):
        if len(one) == CHUNK and one.stop <= min(common, len(asked)):
            found = one.stop
            continue
        rest = len(asked) - found
        if one.start != found or rest <= 16:
            break
        good = min(common, one.stop) - one.start
        whole = good == len(one) and len(one) < CHUNK
        found += good if whole else good // 16 * 16
        break
    return min(found, len(asked) - 1)


def other(tokens: Sequence[int], at: int, length: int) -> list[int]:
    """A prompt that has so many tokens of another, and its own then."""
    return [*tokens[:at], *(7000 + i for i in range(length - at))]


@pytest.mark.parametrize("length", [16, 17, 20, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 200])
@pytest.mark.parametrize("new", [1, 6])
def test_the_next_turn_computes_what_is_new(make_rig: Make, length: int, new: int) -> None:
    rig = make_rig(extra=ON)
    tokens = prompt(length)
    name = rig.add(tokens, new)
    rig.run()
    rig.settle()
    rig.reset()
    known = rig.tokens[name][: length + new - 1]
    turn = [*rig.tokens[name], *range(9000, 9050)]
    rig.add(turn, 3)
    step = rig.step()
    rig.run()
    found = loadable(known, turn)
    assert record(rig)["loaded_tokens"] == found
    assert step.num_tokens == len(turn) - found
    assert len(known) - found < 16, "no more is computed again than is shorter than a mark"
    assert record(rig)["inside_tokens"] == found % CHUNK
    rig.check()


def test_another_question_about_the_same_document(make_rig: Make) -> None:
    """It parts anywhere: at, before and behind the ends of blocks, marks, chunks and the tail."""
    rig = make_rig(extra=ON)
    tokens = prompt(2 * CHUNK + 25)
    rig.warm(tokens)
    for at in [1, 15, 16, 17, *range(CHUNK - 2, 2 * CHUNK + 25)]:
        asked = other(tokens, at, 3 * CHUNK + 3)
        rig.add(asked)
        step = rig.step()
        rig.run()
        found = loadable(tokens, asked)
        assert found <= at
        assert record(rig)["loaded_tokens"] == found
        assert step.num_tokens == len(asked) - found
        rig.reset()
        # What it stored would be found by the next one.
        assert rig.node is not None
        client = rig.node.connect()
        client.clear()
        client.close()
        rig.warm(tokens)
    rig.check()


def test_a_load_that_ends_inside_a_block_beside_others(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronous, chunk by chunk out of a slower tier; the tail from host memory."""
    tier = GatedTier()
    rig = make_rig(extra=ON, make_node=tiered(tier))
    tokens = prompt(3 * CHUNK + 25)
    rig.warm(tokens)
    assert rig.node is not None
    client = rig.node.connect()
    client.flush()
    rig.side.on_new_request(request := rig.request(tokens, name="x"))
    keys = rig.side._states["x"].keys
    rig.connector.request_finished(request, [])
    client.clear(keys, ["host"])
    client.close()
    tier.opened.clear()
    busy = rig.add(prompt(40, seed=9), 30)
    rig.step()
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (1.0, 0.0))
    rig.add([*tokens, *range(9000, 9010)], 3)
    for _ in range(3):
        rig.step()
    tier.opened.set()
    rig.run()
    rig.settle()
    records = {r["prompt_tokens"]: r for r in rig.state()["requests"]}
    told = records[len(tokens) + 10]
    assert (told["load"], told["loaded_tokens"]) == ("async", len(tokens))
    assert told["inside_tokens"] == 25
    assert len(rig.answers[busy]) == 30
    rig.check()


def test_an_object_that_does_not_come_is_computed(make_rig: Make) -> None:
    tier = GatedTier()
    rig = make_rig(extra={**ON, "deadlines.load": "300ms"}, make_node=tiered(tier))
    tokens = prompt(3 * CHUNK)
    rig.warm(tokens)
    assert rig.node is not None
    client = rig.node.connect()
    client.flush()
    rig.side.on_new_request(request := rig.request(tokens, name="x"))
    keys = rig.side._states["x"].keys
    rig.connector.request_finished(request, [])
    client.clear(keys[2:], ["host"])
    client.close()
    tier.opened.clear()
    name = rig.add(other(tokens, 2 * CHUNK + 20, 4 * CHUNK), 3)
    rig.run()
    assert rig.cut == [name]
    tier.opened.set()
    told = record(rig)
    assert (told["loaded_tokens"], told["inside_tokens"]) == (2 * CHUNK, 0)
    rig.check()


def test_what_vllm_has_itself_is_not_loaded(make_rig: Make) -> None:
    rig = make_rig(extra=ON)
    tokens = prompt(2 * CHUNK + 20)
    rig.ask(tokens)
    rig.settle()
    # Its own blocks of 16 end behind the whole chunks.
    assert rig.ask([*tokens[: 2 * CHUNK + 17], *range(9000, 9030)]) == 0
    assert record(rig)["local_tokens"] in (0, 2 * CHUNK + BLOCK)
    # Where they end before, the rest comes out of the chunk.
    rig.reset()
    rig.ask(other(tokens, CHUNK + BLOCK, CHUNK + 20))
    rig.settle()
    before = rig.num_external
    rig.add(tokens)
    rig.run()
    assert rig.num_external > before
    rig.check()


def test_a_salt_keeps_it_apart(make_rig: Make) -> None:
    rig = make_rig(extra=ON)
    tokens = prompt(CHUNK + 25)
    rig.ask(tokens, cache_salt="a")
    rig.settle()
    rig.reset()
    for salt, loaded in (("b", 0), (None, 0), ("a", CHUNK + 25)):
        rig.add([*tokens, *range(40)], cache_salt=salt)
        rig.run()
        assert record(rig)["loaded_tokens"] == loaded
        rig.reset()
    rig.check()


def test_pictures_keep_it_apart(make_rig: Make) -> None:
    from tests.connector.test_keys_and_stores import feature

    rig = make_rig(extra=ON)
    states = {}
    for name in ("cat", "dog", "cat again"):
        request = rig.request(prompt(50), name=name, mm_features=[feature(name[:3], 20, 8)])
        rig.connector.on_new_request(request)
        states[name] = rig.side._states[name]
    marks = {name: state.marks(range(1), 50) for name, state in states.items()}
    assert marks["cat"] == marks["cat again"]
    assert marks["cat"][:12] == marks["dog"][:12]
    assert marks["cat"][12:] != marks["dog"][12:]
    for name, state in states.items():
        rig.connector.request_finished(state.request, [])
        assert name not in rig.side._states
    rig.check()


def test_two_ranks(make_rig: Make) -> None:
    rig = make_rig(ranks=2, extra=ON)
    tokens = prompt(2 * CHUNK + 25)
    rig.warm(tokens)
    for at in (CHUNK + 20, 2 * CHUNK + 25):
        asked = other(tokens, at, 3 * CHUNK)
        rig.add(asked, 3)
        rig.run()
        assert record(rig)["loaded_tokens"] == loadable(tokens, asked)
        rig.reset()
    rig.check()


def test_a_node_that_does_not_answer_costs_a_busy_engine_no_step(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(extra={**ON, "deadlines.match": "1ms"})
    tokens = prompt(CHUNK + 25)
    rig.warm(tokens)
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (0.0, 0.0))
    busy = rig.add(prompt(40, seed=9), 30)
    rig.step()
    rig.step()
    gate = rig.gate(p.Inside)
    rig.add([*tokens, *range(9000, 9040)], 3)
    rig.until(lambda: bool(rig.step()) and gate.num_asked > 0)
    rig.until(lambda: rig.side._states == {} or bool(rig.step()))
    rig.run()
    gate.open()
    assert len(rig.answers[busy]) == 30
    records = {r["prompt_tokens"]: r for r in rig.state()["requests"]}
    assert records[len(tokens) + 40]["loaded_tokens"] == CHUNK
    rig.check()  # and what came too late has been given back


def test_a_hint_limits_it(make_rig: Make) -> None:
    from vllm import SamplingParams

    rig = make_rig(extra=ON)
    tokens = prompt(2 * CHUNK + 25)
    rig.warm(tokens)
    for limit, loaded in ((CHUNK + 15, CHUNK), (CHUNK + 20, CHUNK + 16), (20, 16)):
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args={
            "kv_transfer_params": {"kvstrata": {"max_load_tokens": limit}}})  # fmt: skip
        sampling.update_from_generation_config({}, 0)
        rig.add(tokens, sampling_params=sampling)
        rig.run()
        assert record(rig)["loaded_tokens"] == loaded
        rig.reset()
    rig.check()


def test_marks_go_with_their_objects() -> None:
    store = Store(b"n", [b"a", b"b", b"c"], 1, [1, 2, 3, 4], given=2, marks=b"bbbccc")
    assert store.computed().marks == b"ccc"
    assert store.computed().blocks == [3, 4]


@pytest.mark.parametrize("more", [16, 17, 24, 31])
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_of_others_lies_behind_a_tail(make_rig: Make, more: int, ranks: int) -> None:
    rig = make_rig(ranks=ranks, extra=ON)
    for memory in rig.memories:
        memory.kv[:] = 0xEE  # what others left in the blocks
    tokens = prompt(CHUNK + more)
    rig.warm(tokens)
    assert rig.node is not None
    host, num_tails = rig.node.node.host, 0
    for key in list(host.index.keys()):
        for rank, slot in host.index.objects(key):
            header = verify_object(host.pool.view(slot.offset, slot.nbytes), identity(key, rank))
            stored = host.pool.view(slot.offset + HEADER_BYTES, header.raw_length)
            kv = np.frombuffer(stored, np.uint8).reshape(LAYERS, -1, WORD)
            of = digests(tokens)[header.start : header.end]
            assert (kv[:, : header.num_tokens] == rig.memories[rank].words(of)).all()
            assert not kv[:, header.num_tokens :].any()
            num_tails += header.is_tail
    assert num_tails == ranks
    rig.check()


def test_an_object_that_begins_otherwise_is_not_taken(make_rig: Make) -> None:
    """What is known of objects may be out of date, or forged on a disk."""
    rig = make_rig(extra=ON, make_node=tiered(GatedTier()))
    tokens = prompt(CHUNK)
    rig.warm(tokens)
    rig.drop_host()
    asked = prompt(CHUNK, seed=5)
    rig.side.on_new_request(request := rig.request(asked, name="x"))
    marks = rig.side._states["x"].marks(range(1), CHUNK)
    rig.connector.request_finished(request, [])
    assert rig.node is not None
    children = rig.node.node.insides.children
    (key,) = rig.node.node.insides._owned["memory"].index.keys()
    children.leave(key)
    children.enter(key, CHUNK, CHUNK, marks)
    rig.add(asked, 3)
    rig.run()
    assert len(rig.failed) == 1
    assert record(rig)["loaded_tokens"] == 0
    rig.check()


@pytest.mark.parametrize("pipelined", [False, True])
def test_random_histories(make_rig: Make, pipelined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats that go on, documents asked about again, aborts, few blocks, little memory."""
    draw = random.Random(3)
    tier = GatedTier()
    rig = make_rig(num_blocks=40, pipelined=pipelined, make_node=tiered(tier),
                   extra={**ON, "host.capacity": "1MiB"})  # fmt: skip
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (1.0, 0.0))
    said = [prompt(draw.randint(1, 100), seed) for seed in range(6)]
    for number in range(120):
        base = draw.choice(said)
        at = draw.choice([len(base), draw.randint(0, len(base))])
        asked = [*base[:at], *(number * 100 + 10_000 + i for i in range(draw.randint(1, 40)))]
        asked = asked[:300]
        name = rig.add(asked, draw.randint(1, 12))
        for _ in range(draw.randint(0, 6)):
            rig.step()
        if draw.random() < 0.1 and name in rig.scheduler.requests:
            rig.abort(name)
        if draw.random() < 0.5:
            rig.run()
            said[draw.randrange(6)] = list(rig.tokens[name])
        if draw.random() < 0.2:
            rig.run()
            rig.settle()
            rig.reset()
        if draw.random() < 0.1:
            rig.drop_host()
    rig.run()
    assert rig.state()["counters"]["inside_tokens_total"] > 100
    rig.check()


@pytest.mark.parametrize("length", [18, 24, 32 + 17, 32 + 31])
@pytest.mark.parametrize("beside", [False, True])
def test_the_same_prompt_again_leaves_one_token(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch, length: int, beside: bool
) -> None:
    rig = make_rig(extra=ON)
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (1.0, 0.0))
    tokens = prompt(length)
    rig.warm(tokens)
    if beside:
        rig.add(prompt(40, seed=9), 30)
        rig.step()
        rig.step()
    name = rig.add(tokens, 3)
    rig.run()
    rig.settle()
    told = next(r for r in rig.state()["requests"][::-1] if r["prompt_tokens"] == length)
    # vLLM itself backs off a token of what comes in the background.
    assert told["loaded_tokens"] in ((length - 1,) if told["load"] == "sync" else (length,))
    assert len(rig.answers[name]) == 3
    rig.check()


def test_what_is_shorter_than_a_chunk_is_no_miss(make_rig: Make) -> None:
    rig = make_rig(extra=ON)
    rig.ask(prompt(25))
    assert record(rig)["miss"] == "shorter than a chunk"
    rig.reset()
    rig.ask([*prompt(25), 1, 2, 3])
    assert (record(rig)["miss"], record(rig)["loaded_tokens"]) == ("partly stored", 25)
    rig.check()


@pytest.mark.parametrize("message", [p.Match, p.Inside])
def test_an_answer_of_a_node_that_has_gone_is_no_answer(make_rig: Make, message: type) -> None:
    """It had come, and nobody had heard it yet."""
    rig = make_rig(extra={**ON, "deadlines.match": "1ms"})
    tokens = prompt(2 * CHUNK)
    rig.warm(tokens)
    gate = rig.gate(message)
    name = rig.add(other(tokens, CHUNK + 20, 3 * CHUNK), 3)

    def asked() -> bool:
        rig.step()
        return gate.num_asked > 0

    rig.until(asked)
    call, client = rig.side._states[name].call, rig.side._lookups.client
    assert call is not None
    assert client is not None
    gate.open()
    rig.until(call.ready)
    rig.stop_node()

    def is_seen_to_be_gone() -> bool:
        client.release(1)
        return not client.alive

    rig.until(is_seen_to_be_gone)
    rig.start_node()
    rig.attach()
    rig.run()
    assert rig.failed == rig.cut == []
    assert record(rig)["loaded_tokens"] == 0
    rig.check()


def test_what_may_be_lossy_ends_no_chain_of_chunks(make_rig: Make) -> None:
    """What is given is not stored again; the chunk that it only begins is, and what follows."""
    # What is written over may not be just being verified.
    rig = make_rig(extra={**ON, "host.verify_every": 0})
    tokens = prompt(2 * CHUNK + 20)
    rig.warm(tokens)
    found = state_of(rig, tokens)
    assert rig.node is not None
    with contextlib.closing(rig.node.connect()) as client:
        lookups = rig.side._lookups
        matched = client.match(found.keys, [0], lookups.orders, lookups.lengths).wait(10)
        for offset in offsets_of(matched.offsets):
            as_portable(rig, client.pool, offset)
        client.release(matched.lease)
    turn = [*tokens, *range(9000, 9060)]
    assert rig.ask(turn) == 2 * CHUNK + 2 * BLOCK
    assert rig.workers[0]._transfers.read_portable
    rig.settle()
    rig.reset()
    assert rig.ask([*turn, *range(9100, 9140)]) >= len(turn) // CHUNK * CHUNK > 2 * CHUNK
    # And of what a lossy codec may have kept nothing begins a chunk.
    handlers, asked = rig.node.node._handlers, list[Any]()
    real = handlers[p.Inside]
    rig.settle()
    rig.reset()

    def hear(client: Any, message: Any) -> Any:
        asked.append(message)
        return real(client, message)

    handlers[p.Inside] = hear
    rig.ask(other(tokens, CHUNK + 16, 3 * CHUNK))
    assert [message.orders for message in asked] == [[o for o in lookups.orders if o != PORTABLE]]
    rig.check()
