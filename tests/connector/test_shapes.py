"""Layers of one block table but of two shapes, as a draft model's beside the target's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.connector.fake_model import BLOCK, CHUNK, DRAFT, NAMES, SPECS, kv_cache_config
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config

from kvstrata.config import load_config
from kvstrata.connectors.vllm.groups import cut_by_shape, groups_of
from kvstrata.objects import HEADER_BYTES, decode

Make = Callable[..., Rig]

CONFIG = load_config(environ={}, overrides={"chunk_tokens": CHUNK})
MORE = 1 << 16
"""The part that `DRAFT` is of a chunk of one group."""


def test_each_shape_is_a_part_of_its_own_in_the_same_blocks() -> None:
    caches = kv_cache_config(8, ("window", "full"), draft=1)
    cut = cut_by_shape(caches)
    assert [group.layer_names for group in cut.kv_cache_groups] == [
        list(NAMES), [f"{name}.1" for name in NAMES], [DRAFT],
    ]  # fmt: skip
    assert cut.kv_cache_groups[1].kv_cache_spec == SPECS["full"]
    assert cut.kv_cache_groups[2].kv_cache_spec.num_kv_heads == 2
    assert cut_by_shape(cut) == cut
    groups = groups_of(caches, CONFIG)
    (more,) = groups.more
    assert (more.index, more.table) == (2, 1)
    assert [groups.column(group) for group in (*groups.each, more)] == [0, 2, 2]
    assert groups.num_blocks == 4
    # The scheduler sees the first of the shapes alone, and plans the same.
    seen = groups_of(generate_scheduler_kv_cache_config([caches]), CONFIG)
    assert (seen.each, seen.more) == (groups.each, ())


def test_a_stage_without_layers_of_a_group_has_its_place_all_the_same() -> None:
    caches = kv_cache_config(8, ("full", "window"), draft=0)
    caches.kv_cache_groups[0].layer_names.clear()
    groups = groups_of(caches, CONFIG)
    assert [group.index for group in groups.each] == [0, 1]
    assert groups.more == ()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("ends", ["at once", "late"])
def test_warm_from_the_host(make_rig: Make, ranks: int, pipelined: bool, ends: Any) -> None:
    """Of one block table, so loaded before the step, layer by layer, as one shape is."""
    rig = make_rig(draft=0, ranks=ranks, pipelined=pipelined, ends=ends)
    assert rig.side._lookups.parts == [*range(ranks), *(MORE | rank for rank in range(ranks))]
    tokens = prompt(200)
    rig.warm(tokens)
    assert rig.state()["host"]["num_objects"] == 2 * ranks * (200 // CHUNK)
    assert rig.ask(tokens, 40) == 200 // CHUNK * CHUNK
    assert any(step.sync_loads for step in rig.steps)
    rig.check()


def test_both_are_loaded_in_the_background(make_rig: Make) -> None:
    rig = make_rig(draft=0, make_node=tiered(GatedTier()))
    tokens = prompt(200)
    rig.warm(tokens)
    rig.drop_host()
    assert rig.ask(tokens, 3) == 200 // CHUNK * CHUNK
    assert any(step.async_loads for step in rig.steps)
    rig.check()


def test_one_that_is_damaged_costs_the_chunk(make_rig: Make) -> None:
    """Without a draft's KV the target's would be right and the drafts guessed from nothing."""
    rig = make_rig(draft=0, extra={"host.verify_every": 0})
    tokens = prompt(200)
    rig.warm(tokens)
    name = rig.add(tokens, 3)
    state = rig.side._states[name]
    rig.look_up(state.request)
    client = rig.workers[0]._client
    assert client is not None
    target, draft = (client.pool.array(at, HEADER_BYTES) for at in state.offsets[-2:])
    headers = [decode(page.tobytes()) for page in (target, draft)]
    assert [header.group for header in headers] == [0, 1]
    assert [header.shape[0] for header in headers] == [2, 1]
    good = draft.copy()
    draft[100] ^= 1
    rig.run()
    draft[:] = good
    assert len(rig.answers[name]) == 3
    rig.check()
    assert rig.ask(tokens) == 200 // CHUNK * CHUNK, "another request is loaded as ever"
    rig.check()


def test_the_next_turn_computes_what_is_new(make_rig: Make) -> None:
    """The end of what is stored, which fills neither a chunk nor its last block, is of both."""
    rig = make_rig(draft=0, extra={"inside": "on"})
    name = rig.add(prompt(3 * CHUNK + 24), 2)
    rig.run()
    rig.settle()
    rig.reset()
    turn = [*rig.tokens[name], *range(9000, 9050)]
    rig.add(turn, 3)
    assert rig.step().num_tokens == len(turn) - (3 * CHUNK + 25)
    rig.run()
    rig.settle()
    rig.reset()
    rig.add([*turn[: CHUNK + 20], *range(9000, 9050)], 3)
    assert rig.step().num_tokens == 50 + 4, "whole steps of 16 tokens of one that goes on otherwise"
    rig.run()
    rig.check()


@pytest.mark.parametrize(
    ("kinds", "draft"), [(("full",), 0), (("window", "full"), 1), (("window",), 0)]
)
@pytest.mark.parametrize("seed", range(2))
def test_any_history_gives_right_answers(
    make_rig: Make, kinds: tuple[str, ...], draft: int, seed: int
) -> None:
    """Prompts that share beginnings, few blocks, preemption, aborts, steps of few tokens."""
    rig = make_rig(
        kinds=kinds,
        draft=draft,
        num_blocks=56 * len(kinds),
        max_num_batched_tokens=96,
        max_num_seqs=6,
        pipelined=bool(seed),
        extra={"host.capacity": "2MiB", "inside": "on"},
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
    assert rig.num_external > BLOCK
    rig.check()
