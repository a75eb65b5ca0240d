"""Models with several layer groups, or one that does not need every chunk, in vLLM's scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.connector.fake_model import BLOCK, CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_worker_side import open_later, slow

from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.wire import protocol as p

Make = Callable[..., Rig]

KINDS = [
    ("full", "window"),
    ("window", "full", "long window"),
    ("full", "piece"),
    ("full", "full"),
    ("window",),
    ("full", "state"),
    ("state",),
    ("state", "full", "window"),
]
SLIDING = ("window", "full", "long window")


def chunk(kinds: tuple[str, ...]) -> int:
    """A prompt leaves a state at its last whole block, so there a chunk is a block."""
    return BLOCK if "state" in kinds else CHUNK


def rig_of(make_rig: Make, kinds: tuple[str, ...], **options: Any) -> Rig:
    extra = {"chunk_tokens": chunk(kinds), **options.pop("extra", {})}
    return make_rig(kinds=kinds, extra=extra, num_blocks=options.pop("num_blocks", 160), **options)


# the rules


@given(
    kind=st.sampled_from(["sliding", "chunked"]),
    reach=st.integers(1, 200),
    per_chunk=st.sampled_from([1, 2, 4]),
    number=st.integers(1, 20),
)
def test_what_a_boundary_needs_is_what_layers_look_back_to(
    kind: Any, reach: int, per_chunk: int, number: int
) -> None:
    size = per_chunk * BLOCK
    needs = Group(0, kind, BLOCK, reach).needs(size)
    end = number * size
    first = end - reach + 1 if kind == "sliding" else end // reach * reach
    assert needs >= 1
    assert max(0, number - needs) * size <= max(0, first)
    if kind == "sliding" and needs > 1:
        assert (number - needs + 1) * size > first, "no chunk more than that"


@settings(max_examples=50)
@given(st.data())
def test_runs_are_the_chunks_whose_blocks_are_all_there(data: st.DataObject) -> None:
    group = Group(0, "sliding", BLOCK, 40)
    groups = Groups((group,), 2 * BLOCK)
    ids = data.draw(st.lists(st.sampled_from([0, 7, 8, 9]), max_size=24))
    first = data.draw(st.integers(0, 6))
    done = first + data.draw(st.integers(0, 8))
    runs = list(groups.stored(group, ids, first, done))
    whole = [
        i for i in range(first, done) if len(ids) >= 2 * i + 2 and 0 not in ids[2 * i : 2 * i + 2]
    ]
    assert [i for run in runs for i in run] == whole
    assert all(one.stop < other.start for one, other in pairwise(runs))


def test_the_blocks_of_a_load_come_chunk_by_chunk() -> None:
    full = Group(0, "full", BLOCK)
    window = Group(1, "sliding", BLOCK, 40)
    state = Group(2, "recurrent", BLOCK)
    groups = Groups((full, window, state), 2 * BLOCK)
    assert groups.num_blocks == 5
    ids = [[1, 2, 3, 4, 5, 6, 90], [0, 0, 0, 14, 15, 16, 91], [0, 0, 0, 0, 0, 26, 92]]
    targets = groups.targets(ids, range(BLOCK, 6 * BLOCK), range(3))
    assert targets == [-1, 2, -1, -1, -1, 3, 4, -1, 14, -1, 5, 6, 15, 16, 26]
    assert [groups.column(group) for group in groups.each] == [0, 2, 4]
    assert not groups.prefix_only
    assert Groups((full,), 2 * BLOCK).prefix_only
    assert not Groups((window,), 2 * BLOCK).prefix_only


# in the scheduler


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("length", [33, 128, 300])
def test_warm_from_the_host(make_rig: Make, kinds: tuple[str, ...], length: int) -> None:
    """The longest boundary before the last token; never in a step that computes."""
    rig = rig_of(make_rig, kinds)
    tokens, size = prompt(length), chunk(kinds)
    rig.warm(tokens)
    before = len(rig.steps)
    assert rig.ask(tokens, 3) == (length - 1) // size * size
    steps = rig.steps[before:]
    assert not any(step.sync_loads for step in steps)
    computed = [step.num_tokens for step in steps if step.num_tokens]
    assert computed[0] == length - (length - 1) // size * size
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
def test_what_vllm_has_itself_is_left_as_it_is(make_rig: Make, kinds: tuple[str, ...]) -> None:
    rig = rig_of(make_rig, kinds)
    tokens, size = prompt(300), chunk(kinds)
    rig.warm(tokens)
    rig.ask(tokens[:129])
    assert rig.ask(tokens) > 0
    assert rig.ask(tokens, 4) == 0, "vLLM has all of it"
    assert rig.ask(tokens[:200]) <= 200 // size * size
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
def test_from_a_slower_tier(make_rig: Make, kinds: tuple[str, ...]) -> None:
    rig = rig_of(make_rig, kinds, make_node=tiered(GatedTier()))
    tokens, size = prompt(200), chunk(kinds)
    rig.warm(tokens)
    rig.drop_host()
    assert rig.ask(tokens, 3) == 199 // size * size
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_the_next_turn_of_a_chat(make_rig: Make, kinds: tuple[str, ...], pipelined: bool) -> None:
    rig = rig_of(make_rig, kinds, pipelined=pipelined)
    size = chunk(kinds)
    rig.ask(prompt(75), 60)
    said = rig.tokens["r1"]
    rig.settle()
    rig.reset()
    told = rig.ask([*said, *range(50)], 2)
    # What the last token that was sampled would have filled has not been computed.
    assert told == (len(said) - 1) // size * size
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_chunked_prefill_leaves_the_ends_of_its_steps(
    make_rig: Make, kinds: tuple[str, ...], pipelined: bool
) -> None:
    rig = rig_of(make_rig, kinds, max_num_batched_tokens=64, pipelined=pipelined)
    tokens = prompt(333)
    rig.warm(tokens)
    size = chunk(kinds)
    assert rig.ask(tokens, 3) == 332 // size * size
    rig.settle()
    rig.reset()
    # Another end: where a state is, or any chunk.
    other = [*tokens[:200], 1, 2, 3]
    stride = 64 if "state" in kinds else size
    assert rig.ask(other, 3) == 200 // stride * stride
    rig.check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_history_gives_right_answers(make_rig: Make, kinds: tuple[str, ...], seed: int) -> None:
    """Prompts that share beginnings, few blocks, preemption, aborts, steps of few tokens."""
    rig = rig_of(
        make_rig,
        kinds,
        num_blocks=56 * len(kinds),
        max_num_batched_tokens=96,
        max_num_seqs=6,
        pipelined=bool(seed),
        extra={"host.capacity": "2MiB"},
    )
    choose = random.Random(seed)
    stems = [prompt(choose.randrange(20, 200), seed=i) for i in range(3)]
    names: list[str] = []
    for _ in range(14):
        stem = choose.choice(stems)
        cut = choose.randrange(1, len(stem) + 1)
        tail = prompt(choose.randrange(1, 120), seed=choose.randrange(50))
        names.append(rig.add([*stem[:cut], *tail], choose.randrange(1, 40)))
        for _ in range(choose.randrange(12)):
            rig.step()
        if choose.random() < 0.15:
            rig.abort(choose.choice(names))
        if choose.random() < 0.2:
            rig.run()
            rig.settle()
            rig.reset()
    rig.run()
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize("kinds", [SLIDING, ("state", "full", "window")])
def test_a_needed_object_that_is_damaged_fails_the_whole_load(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    rig = rig_of(make_rig, kinds, extra={"host.verify_every": 0})
    tokens, size = prompt(300), chunk(kinds)
    rig.warm(tokens)
    name = rig.add(tokens, 3)
    state = rig.side._states[name]
    rig.until(lambda: state.call is None or state.call.ready())
    rig.look_up(state.request)
    worker = rig.workers[0]
    assert worker._client is not None
    parts = len(rig.side._lookups.parts)
    offset = state.offsets[-parts:][0]
    page = worker._client.pool.array(offset, HEADER_BYTES)
    good = page.copy()
    page[100] ^= 1
    rig.run()
    page[:] = good
    assert rig.failed == [name]
    assert rig.cut == []
    assert [len(rig.answers[name])] == [3]
    rig.check()
    assert rig.ask(tokens) == 299 // size * size, "another request is loaded as ever"
    rig.check()


@pytest.mark.parametrize("kinds", [SLIDING, ("full", "state")])
def test_what_does_not_come_is_computed_from_the_beginning(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    """A part of a window or none of it: so vLLM hears of the request, never of blocks."""
    tier = GatedTier()
    rig = rig_of(make_rig, kinds, make_node=tiered(tier, 0.2), extra={"deadlines.load": "300ms"})
    tokens = prompt(300)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    name = rig.add(tokens, 3)
    rig.run()
    tier.opened.set()
    assert rig.failed == [name]
    assert rig.cut == []
    assert rig.wrong() == []
    assert len(rig.answers[name]) == 3


def test_an_aborted_load_ends_and_holds_nothing(make_rig: Make) -> None:
    tier = GatedTier()
    rig = rig_of(make_rig, SLIDING, make_node=tiered(tier))
    tokens = prompt(300)
    rig.warm(tokens)
    rig.drop_host()
    tier.opened.clear()
    name = rig.add(tokens, 3)
    while not rig.steps[-1].async_loads:
        rig.step()
    rig.abort(name)
    rig.step()
    tier.opened.set()
    rig.run()
    assert rig.answers[name] == []
    rig.check()


def test_less_than_what_was_found_is_never_taken_for_it(make_rig: Make) -> None:
    """vLLM would count these tokens as computed: the load fails, and they are."""
    rig = rig_of(make_rig, SLIDING)
    tokens = prompt(300)
    rig.warm(tokens)
    real = rig.connector.get_num_new_matched_tokens

    def fewer(request: Any, computed: int) -> tuple[int | None, bool]:
        count, later = real(request, computed)
        return (count - CHUNK, later) if count else (count, later)

    rig.connector.get_num_new_matched_tokens = fewer  # type: ignore[assignment,method-assign]
    name = rig.add(tokens, 3)
    rig.run()
    assert rig.failed == [name]
    rig.check()


def test_only_what_a_boundary_needs_is_copied(make_rig: Make) -> None:
    rig = rig_of(make_rig, SLIDING)
    tokens = prompt(10 * CHUNK + 1)
    rig.warm(tokens)
    rig.ask(tokens)
    (load,) = (load for step in rig.steps for load in step.async_loads)
    copied = np.array(load.blocks).reshape(10, -1) >= 0
    window, full, long = copied[:, :2], copied[:, 2:4], copied[:, 4:]
    assert full.all()
    # 39 tokens look back into three blocks, of two chunks; 96 into six, of three.
    assert window.sum() == 3
    assert long.sum() == 6
    needless = np.array(load.offsets) == p.NEEDLESS
    assert needless.sum(axis=0).tolist() == [8, 0, 7]
    rig.check()


def test_a_state_is_kept_where_two_prompts_part(make_rig: Make) -> None:
    """Attention is stored up to there, and no state: the third prompt finds the second one's."""
    rig = rig_of(make_rig, ("full", "state"))
    tokens = prompt(333)
    rig.warm(tokens)
    rig.warm([*tokens[:200], *prompt(100, seed=1)])
    computed = [step.num_tokens for step in rig.steps if step.num_tokens]
    assert computed == [320, 13, 192, 96, 12]
    assert rig.ask([*tokens[:200], *prompt(90, seed=2)], 3) == 192
    rig.check()


def test_a_state_within_a_chunk_is_of_no_use(make_rig: Make) -> None:
    """It would be taken for the one at the chunk's end."""
    rig = rig_of(make_rig, ("full", "state"), extra={"chunk_tokens": 2 * BLOCK})
    tokens = prompt(5 * BLOCK + 3)
    rig.warm(tokens)
    assert rig.ask(tokens, 3) == 0
    rig.settle()
    rig.reset()
    longer = [*tokens[: 4 * BLOCK], *prompt(BLOCK, seed=1)]
    rig.warm(longer)
    assert rig.ask(tokens, 3) == 4 * BLOCK, "the same prompt's last whole block"
    rig.check()


@pytest.mark.parametrize("kinds", [("full", "window"), ("window", "full"), ("full", "state")])
def test_no_group_s_blocks_are_overwritten_while_a_store_reads_them(
    make_rig: Make, kinds: tuple[str, ...]
) -> None:
    rig = rig_of(make_rig, kinds, num_blocks=20 if "window" in kinds else 12)
    copier = slow(rig)
    first, second = prompt(128), prompt(128, seed=1)
    rig.add(first)
    while rig.scheduler.requests:
        rig.step()
    rig.reset()
    timer = open_later(copier, 0.3)
    rig.ask(second)
    timer.join()
    rig.settle()
    rig.reset()
    assert rig.ask(first) > 0
    assert rig.failed == []
    rig.check()


def test_headers_say_what_the_objects_are(make_rig: Make) -> None:
    kinds = ("full", "window", "piece", "state")
    rig = rig_of(make_rig, kinds)
    tokens = prompt(4 * BLOCK + 1)
    rig.warm(tokens)
    name = rig.add(tokens)
    state = rig.side._states[name]
    rig.look_up(state.request)
    client = rig.workers[0]._client
    assert client is not None
    headers = [
        decode(client.pool.view(offset, HEADER_BYTES)) for offset in state.offsets[-len(kinds) :]
    ]
    assert [header.group for header in headers] == [0, 1, 2, 3]
    assert [header.group_kind for header in headers] == ["full", "sliding", "chunked", "recurrent"]
    assert [header.boundary for header in headers] == [0, 40, 64, 4 * BLOCK]
    rig.run()
    rig.check()


def test_every_rank_has_its_own_objects_of_every_group(make_rig: Make) -> None:
    rig = rig_of(make_rig, SLIDING, ranks=2)
    assert rig.side._lookups.parts == [group << 16 | rank for group in range(3) for rank in (0, 1)]
    tokens = prompt(300)
    rig.warm(tokens)
    assert rig.state()["host"]["num_objects"] == 6 * (300 // CHUNK)
    assert rig.ask(tokens, 3) == 299 // CHUNK * CHUNK
    rig.check()


def test_what_all_ranks_hold_is_stored_once(make_rig: Make) -> None:
    """A latent under tensor parallelism: every rank reads it, the first one stores it."""
    rig = make_rig(kinds=("latent",), ranks=2)
    assert rig.side._lookups.parts == [0]
    tokens = prompt(200)
    rig.warm(tokens)
    assert rig.state()["host"]["num_objects"] == 200 // CHUNK
    assert rig.ask(tokens, 3) == 200 // CHUNK * CHUNK
    rig.check()
