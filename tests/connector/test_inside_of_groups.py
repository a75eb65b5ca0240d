"""What a prompt parts from inside it, of models with several groups, or with windows alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_inside import in_common, left_by, other, record

from kvstrata.connectors.vllm.groups import Group
from kvstrata.wire import protocol as p

Make = Callable[..., Rig]

KINDS = [
    ("full", "window"),
    ("window", "full", "long window"),
    ("full", "piece"),
    ("full", "full"),
    ("window",),
]
SLIDING = ("window", "full", "long window")


def rig_of(make_rig: Make, kinds: tuple[str, ...], **options: Any) -> Rig:
    extra = {"inside": "on", **options.pop("extra", {})}
    return make_rig(kinds=kinds, extra=extra, num_blocks=options.pop("num_blocks", 160), **options)


def loadable(stored: Sequence[int], asked: Sequence[int]) -> int:
    """Tokens that are loaded of a prompt after one that left KV of these tokens.

    Never the prompt's last one: a window is loaded for the token that comes next.
    """
    common, most = in_common(stored, asked), len(asked) - 1
    whole = min(common, most) // CHUNK * CHUNK
    if most - whole <= 16:
        return whole
    for one in left_by(stored):
        if one.start == whole:
            good = min(common, one.stop) - whole
            is_all = good == len(one)
            return whole + min(good if is_all else good // 16 * 16, most - whole)
    return whole


@given(
    kind=st.sampled_from(["sliding", "chunked"]),
    reach=st.integers(1, 200),
    per_chunk=st.sampled_from([1, 2, 4]),
    number=st.integers(0, 20),
    good=st.integers(1, 63),
)
def test_what_the_boundary_before_it_needs_is_enough(
    kind: Any, reach: int, per_chunk: int, number: int, good: int
) -> None:
    """From a place inside a chunk layers look back no further than its beginning's match leased."""
    size = per_chunk * BLOCK
    end = number * size + min(good, size - 1)
    leased = max(0, number - Group(0, kind, BLOCK, reach).needs(size)) * size
    first = end - reach + 1 if kind == "sliding" else end // reach * reach
    assert leased <= max(0, first)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("length", [16, 33, 47, 65, 127, 200])
@pytest.mark.parametrize("new", [1, 6])
def test_the_next_turn_computes_what_is_new(
    make_rig: Make, kinds: tuple[str, ...], length: int, new: int
) -> None:
    rig = rig_of(make_rig, kinds)
    name = rig.add(prompt(length), new)
    rig.run()
    rig.settle()
    rig.reset()
    known = rig.tokens[name][: length + new - 1]
    turn = [*rig.tokens[name], *range(9000, 9050)]
    before = len(rig.steps)
    rig.add(turn, 3)
    rig.run()
    found = loadable(known, turn)
    assert record(rig)["loaded_tokens"] == found
    computed = [step.num_tokens for step in rig.steps[before:] if step.num_tokens]
    assert computed[0] == len(turn) - found
    assert len(known) - found < 16, "no more is computed again than is shorter than a mark"
    assert record(rig)["inside_tokens"] == found % CHUNK
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
def test_another_question_about_the_same_document(make_rig: Make, kinds: tuple[str, ...]) -> None:
    """It parts anywhere: at, before and behind the ends of blocks, marks, chunks and the tail."""
    rig = rig_of(make_rig, kinds)
    tokens = prompt(5 * CHUNK + 25)
    rig.warm(tokens)
    for at in [15, 16, 17, CHUNK + 20, *range(4 * CHUNK - 2, 5 * CHUNK + 26, 3)]:
        asked = other(tokens, at, 6 * CHUNK + 3)
        rig.add(asked, 2)
        rig.run()
        found = loadable(tokens, asked)
        assert found <= at
        assert record(rig)["loaded_tokens"] == found
        rig.reset()
        # What it stored would be found by the next one.
        assert rig.node is not None
        client = rig.node.connect()
        client.clear()
        client.close()
        rig.warm(tokens)
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("length", [18, 32, 49, 65, 96])
def test_the_same_prompt_again_leaves_one_token(
    make_rig: Make, kinds: tuple[str, ...], length: int
) -> None:
    rig = rig_of(make_rig, kinds)
    tokens = prompt(length)
    rig.warm(tokens)
    rig.add(tokens, 3)
    rig.run()
    found = loadable(tokens, tokens)
    assert found == (length - 1 if (length - 1) % CHUNK > 16 else (length - 1) // CHUNK * CHUNK)
    assert record(rig)["loaded_tokens"] == found
    assert rig.failed == []
    rig.check()


def test_only_what_is_looked_back_to_is_copied(make_rig: Make) -> None:
    """Computed from where the load ends: of a window a block fewer than from the chunk's begin."""
    rig = rig_of(make_rig, SLIDING)
    tokens = prompt(10 * CHUNK + 28)
    rig.warm(tokens)
    rig.add([*tokens, *range(9000, 9020)])
    rig.run()
    (load,) = (load for step in rig.steps for load in step.async_loads)
    assert load.tail_tokens == 28
    copied = np.array(load.blocks).reshape(11, -1) >= 0
    window, full, long = copied[:, :2], copied[:, 2:4], copied[:, 4:]
    assert full.all()
    # 348 tokens have 22 blocks. The last 39 lie in 3 of them, the last 96 in 7.
    assert window.sum() == 22 - (348 - 39) // BLOCK == 3
    assert long.sum() == 22 - (348 - 96) // BLOCK == 7
    needless = np.array(load.offsets) == p.NEEDLESS
    assert needless.sum(axis=0).tolist() == [8, 0, 7]
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
def test_from_a_slower_tier(make_rig: Make, kinds: tuple[str, ...]) -> None:
    rig = rig_of(make_rig, kinds, make_node=tiered(GatedTier()))
    tokens = prompt(5 * CHUNK + 20)
    rig.warm(tokens)
    for asked in (other(tokens, 4 * CHUNK + 20, 6 * CHUNK), [*tokens, *range(9000, 9020)]):
        rig.drop_host()
        rig.add(asked, 3)
        rig.run()
        assert record(rig)["loaded_tokens"] == loadable(tokens, asked)
        assert record(rig)["slower_tokens"] > 0
        rig.reset()
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", [SLIDING, ("full", "full")])
def test_if_it_does_not_come_all_is_computed(make_rig: Make, kinds: tuple[str, ...]) -> None:
    """So vLLM hears of the request, never of blocks."""
    tier = GatedTier()
    rig = rig_of(make_rig, kinds, make_node=tiered(tier, 0.2), extra={"deadlines.load": "300ms"})
    tokens = prompt(3 * CHUNK)
    rig.warm(tokens)
    assert rig.node is not None
    client = rig.node.connect()
    client.flush()
    rig.side.on_new_request(request := rig.request(tokens, name="x"))
    keys = rig.side._states["x"].keys
    rig.connector.request_finished_all_groups(request, tuple([] for _ in kinds))
    client.clear(keys[2:], ["host"])
    client.close()
    tier.opened.clear()
    name = rig.add(other(tokens, 2 * CHUNK + 20, 4 * CHUNK), 3)
    rig.run()
    tier.opened.set()
    assert rig.failed == [name]
    assert rig.cut == []
    assert record(rig)["loaded_tokens"] == 0
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
def test_what_vllm_has_itself_is_not_loaded(make_rig: Make, kinds: tuple[str, ...]) -> None:
    rig = rig_of(make_rig, kinds)
    tokens = prompt(4 * CHUNK + 20)
    rig.warm(tokens)
    rig.ask(other(tokens, 2 * CHUNK + BLOCK, 4 * CHUNK + 1))
    rig.settle()
    rig.add([*tokens, *range(9000, 9030)], 3)
    rig.run()
    told = record(rig)
    assert told["local_tokens"] + told["loaded_tokens"] == len(tokens)
    rig.ask(tokens)
    rig.ask(tokens)
    assert record(rig)["loaded_tokens"] == 0, "vLLM has all of it"
    assert rig.failed == []
    rig.check()


def test_less_than_what_was_found_is_never_taken_for_it(make_rig: Make) -> None:
    """Not even what ends where a chunk does: the match asked for another boundary."""
    rig = rig_of(make_rig, SLIDING)
    tokens = prompt(4 * CHUNK + 20)
    rig.warm(tokens)
    real = rig.connector.get_num_new_matched_tokens

    def fewer(request: Any, computed: int) -> tuple[int | None, bool]:
        count, later = real(request, computed)
        return (count - 20, later) if count else (count, later)

    rig.connector.get_num_new_matched_tokens = fewer  # type: ignore[assignment,method-assign]
    name = rig.add([*tokens, *range(9000, 9030)], 3)
    rig.run()
    assert rig.failed == [name]
    rig.check()


@pytest.mark.parametrize("kinds", [("full", "state"), ("state", "full", "window")])
def test_a_state_has_no_inside(make_rig: Make, kinds: tuple[str, ...]) -> None:
    rig = rig_of(make_rig, kinds, extra={"chunk_tokens": 2 * BLOCK})
    asked = rig.gate(p.Inside)
    tokens = prompt(6 * BLOCK + 25)
    rig.warm(tokens)
    rig.ask([*tokens, *range(9000, 9030)])
    assert asked.num_asked == 0
    assert record(rig)["inside_tokens"] == 0
    assert rig.node is not None
    assert len(rig.node.node.insides.children) == 0, "nothing has marks"
    rig.check()


def test_every_group_leaves_its_end_or_none_does(make_rig: Make) -> None:
    """What vLLM has let go of in one group is of no use in another."""
    rig = rig_of(make_rig, SLIDING)
    rig.side.on_new_request(rig.request(prompt(3 * CHUNK + 20), name="x"))
    state = rig.side._states["x"]
    assert state.chain is not None
    ids = [list(range(1, 9)), list(range(11, 19)), list(range(21, 29))]
    stores = rig.side._stores.last(state, 3 * CHUNK + 20, ids)
    assert [(one.group, one.blocks, one.tail_tokens) for one in stores] == [
        (0, [7, 8], 20), (1, [17, 18], 20), (2, [27, 28], 20)
    ]  # fmt: skip
    assert len({(one.prefix[-1], one.marks) for one in stores}) == 1
    for lost in ([*ids[2][:6], 0, 28], ids[2][:7]):
        state.tail_stored = False
        assert rig.side._stores.last(state, 3 * CHUNK + 20, [ids[0], ids[1], lost]) == []
    rig.connector.request_finished_all_groups(state.request, ([], [], []))
    rig.check()


def test_two_ranks(make_rig: Make) -> None:
    rig = rig_of(make_rig, SLIDING, ranks=2)
    tokens = prompt(4 * CHUNK + 25)
    rig.warm(tokens)
    for at in (3 * CHUNK + 20, 4 * CHUNK + 25):
        asked = other(tokens, at, 5 * CHUNK + 10)
        rig.add(asked, 3)
        rig.run()
        assert record(rig)["loaded_tokens"] == loadable(tokens, asked)
        rig.reset()
    assert rig.failed == []
    rig.check()


def test_a_node_that_does_not_answer_costs_no_more_than_it(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the match found is loaded all the same."""
    rig = rig_of(make_rig, SLIDING, extra={"deadlines.match": "1ms"})
    tokens = prompt(3 * CHUNK + 25)
    rig.warm(tokens)
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (0.0, 0.0))
    busy = rig.add(prompt(40, seed=9), 30)
    rig.step()
    rig.step()
    gate = rig.gate(p.Inside)
    rig.add([*tokens, *range(9000, 9040)], 3)
    rig.until(lambda: bool(rig.step()) and gate.num_asked > 0)
    rig.run()
    gate.open()
    assert len(rig.answers[busy]) == 30
    records = {r["prompt_tokens"]: r for r in rig.state()["requests"]}
    assert records[len(tokens) + 40]["loaded_tokens"] == 3 * CHUNK
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_random_histories(
    make_rig: Make, kinds: tuple[str, ...], pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chats that go on, documents asked about again, aborts, few blocks, little memory."""
    draw = random.Random(len(kinds) + pipelined)
    tier = GatedTier()
    rig = rig_of(
        make_rig, kinds, num_blocks=40 * len(kinds), pipelined=pipelined, make_node=tiered(tier),
        max_num_batched_tokens=96, extra={"host.capacity": "1MiB"},
    )  # fmt: skip
    monkeypatch.setattr(rig.side._pace.computing, "speeds", lambda: (1.0, 0.0))
    said = [prompt(draw.randint(1, 100), seed) for seed in range(5)]
    for number in range(50):
        base = draw.choice(said)
        at = draw.choice([len(base), draw.randint(0, len(base))])
        asked = [*base[:at], *(number * 100 + 10_000 + i for i in range(draw.randint(1, 40)))]
        name = rig.add(asked[:300], draw.randint(1, 12))
        for _ in range(draw.randint(0, 6)):
            rig.step()
        if draw.random() < 0.1 and name in rig.scheduler.requests:
            rig.abort(name)
        if draw.random() < 0.5:
            rig.run()
            said[draw.randrange(5)] = list(rig.tokens[name])
        if draw.random() < 0.5:
            rig.run()
            rig.settle()
            rig.reset()
        if draw.random() < 0.1:
            rig.drop_host()
    rig.run()
    assert rig.state()["counters"]["inside_tokens_total"] > 0
    assert rig.cut == []
    rig.check()
