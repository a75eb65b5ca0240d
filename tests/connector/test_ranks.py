"""Engines of other tensor-parallel sizes read what one stored, where they are told to share.

Each number in a block depends on its head, and a rank's blocks hold the heads that vLLM gives it,
so a slice that is cut, stored or loaded in a wrong place is read as wrong KV.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.connector.fake_model import BLOCK, CHUNK, heads_of
from tests.connector.gates import TIMEOUT_S, GatedTier, tiered
from tests.connector.rig import Rig, prompt, vllm_config
from tests.connector.test_disaggregated import Pair, decode, prefill, record
from tests.connector.test_rotation import as_portable, state_of

from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.messages import WorkerHello, layout_of
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.connectors.vllm.ranks import Slices, cut, slices_of
from kvstrata.errors import Incompatible
from kvstrata.header import ObjectHeader
from kvstrata.layout import LayerGroup, native_order
from kvstrata.objects import HEADER_BYTES
from kvstrata.objects import decode as header_of
from kvstrata.wire.client import offsets_of

Make = Callable[..., Rig]

SHARE = {"share": "ranks"}
SIZES = [
    # KV heads, ranks that write, ranks that read
    (4, 1, 2),
    (4, 2, 1),
    (4, 1, 4),
    (4, 4, 2),
    (8, 2, 8),
    (16, 8, 1),  # two heads a slice
    (12, 4, 2),  # three
    (2, 4, 1),  # two ranks for each head
    (2, 1, 4),
    (2, 4, 2),
    (1, 2, 1),
]
FULL = Group(0, "full", BLOCK)


def beside(make_rig: Make, first: Rig, **options: Any) -> Rig:
    """Another engine on the node of one."""
    extra = {**SHARE, **options.pop("extra", {})}
    return make_rig(node=first.node, path=first.path, extra=extra, **options)


def parallel(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=rank, tensor_parallel_size=size)


# which heads, which objects


@given(heads=st.integers(1, 40), size=st.integers(1, 48), stages=st.integers(1, 3))
def test_slices_are_the_same_heads_whatever_the_number_of_ranks(
    heads: int, size: int, stages: int
) -> None:
    slices = Slices(heads, math.gcd(heads, 8))
    each = heads // slices.count
    stored = []
    for rank in range(size * stages):
        stage, place = divmod(rank, size)
        mine = heads_of(place, size, heads)
        whole = (heads % size == 0 or size % heads == 0) and len(mine) % each == 0
        if not whole:
            with pytest.raises(Incompatible, match=f"{heads} KV heads|model has {heads}"):
                slices.shards(FULL, max(1, heads // size), parallel(rank, size))
            return
        shards = slices.shards(FULL, len(mine), parallel(rank, size))
        assert list(chain(*(shard.heads for shard in shards))) == list(range(len(mine)))
        for shard in shards:
            number = shard.rank - stage * slices.count
            assert [mine[head] for head in shard.heads] == list(
                range(number * each, (number + 1) * each)
            )
            stored += [shard.rank] * shard.stores
    assert stored == list(range(slices.count * stages)), "each by one rank"


def test_a_latent_is_one_object_of_a_stage() -> None:
    latent = replace(FULL, replicated=True)
    shards = [Slices(128, 1).shards(latent, 1, parallel(rank, 4)) for rank in range(8)]
    assert [shard.rank for (shard,) in shards] == [0] * 4 + [1] * 4
    assert [shard.stores for (shard,) in shards] == [True, False, False, False] * 2
    config = vllm_config({}, 8)
    config.model_config.model_arch_config.total_num_kv_heads = 128
    assert slices_of(config, Groups((latent,), CHUNK)) == Slices(128, 1)
    assert slices_of(config, Groups((latent, FULL), CHUNK)) == Slices(128, 8)


def pages_of(heads: int, order: str, block_tokens: int = BLOCK, dtype: str = "bfloat16") -> Pages:
    """Pages of two layers, somewhere."""
    group = LayerGroup(0, "full", 2, heads, 16, 2, dtype)
    kernel = native_order(f"vllm/{order}/b{BLOCK}/{dtype}")
    page = kernel.page_bytes(group) * block_tokens // BLOCK
    return Pages(
        group=group, order=kernel, layer_names=("a", "b"), block_tokens=block_tokens,
        page_bytes=page, num_blocks=3, bases=np.array([10_000, 90_000], np.int64),
        strides=np.array([page + 64, page + 64], np.int64), device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from(["cpu-vec", "cpu-amx", "strided-HNC", "strided-HCN"]),
    heads=st.integers(1, 6),
    data=st.data(),
)
def test_pages_of_some_heads_are_what_the_order_says_of_them(
    order: str, heads: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, heads - 1))
    some = range(first, data.draw(st.integers(first + 1, heads)))
    whole = pages_of(heads, order)
    part = whole.of_heads(some)
    shape = whole.group.portable_shape(3 * BLOCK)
    portable = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    native = whole.order.pack_layers(portable, whole.group)
    cut_out = part.order.pack_layers(
        np.ascontiguousarray(portable[:, :, some.start : some.stop]), part.group
    )
    begin = part.bases - whole.bases
    assert begin[0] == begin[1]
    assert np.array_equal(native[:, :, begin[0] :][:, :, : part.page_bytes], cut_out)
    assert np.array_equal(part.strides, whole.strides)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_head_by_itself_has_one_name_on_every_rank(heads: int) -> None:
    """A rank of one head has `NHC` by vLLM's tensors, whatever the layout."""
    part = pages_of(heads, "strided-HNC").of_heads(range(1, 2))
    assert part.order.name == f"vllm/strided-NHC/b{BLOCK}/bfloat16"
    assert pages_of(4, "strided-HNC").of_heads(range(2)).order.name.split("/")[1] == "strided-HNC"
    assert pages_of(heads, "cpu-vec").of_heads(range(1)).order.name.split("/")[1] == "cpu-vec"


# why not


def refused(pages: Pages, config: Any = None, groups: Groups | None = None, rank: int = 0) -> str:
    """Why a worker with these pages shares nothing."""
    config = config or vllm_config({}, 8)
    config.parallel_config.rank = rank
    groups = groups or Groups((FULL,), CHUNK)
    found = cut(config, groups, {groups.each[0]: pages}, shared=True)
    assert found.slices == 0
    ((_, shard, own),) = found.objects
    assert own is pages
    assert shard.rank == rank
    alone = cut(config, groups, {groups.each[0]: pages}, shared=False)
    assert (found.objects, found.layout) == (alone.objects, alone.layout)
    assert alone.why_alone == ""
    return found.why_alone


def test_heads_that_lie_apart_are_not_shared() -> None:
    """The rank goes on as it would alone, and says why."""
    assert "VLLM_KV_CACHE_LAYOUT to LBHNC" in refused(pages_of(2, "strided-NHC"))
    assert "set --block-size to 16" in refused(pages_of(2, "strided-HNC", 2 * BLOCK))


def test_models_that_ranks_cut_otherwise_are_not_shared() -> None:
    pages = pages_of(2, "strided-HNC")
    state = Group(0, "recurrent", BLOCK)
    assert "recurrent state" in refused(pages, groups=Groups((state,), CHUNK))
    beside_it = Groups((FULL, replace(state, index=1)), CHUNK)
    assert "recurrent state" in refused(pages, groups=beside_it)

    def changed(**changes: Any) -> Any:
        config = vllm_config({}, 8)
        for name, value in changes.items():
            setattr(config.model_config.model_arch_config, name, value)
        return config

    assert "different numbers" in refused(
        pages, changed(per_layer_overrides=[{}, {"total_num_kv_heads": 1}])
    )
    assert "2 KV heads of a layer, where the model has 4" in refused(
        pages, changed(total_num_kv_heads=4)
    )
    three = changed(total_num_kv_heads=6)
    three.parallel_config.tensor_parallel_size = 3
    assert "3 ranks do not share its 6 KV heads in 2 slices" in refused(pages, three, rank=2)


def test_a_draft_model_of_another_shape_leaves_each_size_alone(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_rig(ranks=2, draft=0, extra=SHARE)
    assert "each of 2 ranks has 2 KV heads of a layer, where the model has 2" in caplog.text
    tokens = prompt(200)
    first.warm(tokens)
    assert beside(make_rig, first, ranks=1, draft=0).ask(tokens) == 0
    assert first.ask(tokens) > 0
    first.check()


@pytest.mark.parametrize(("heads", "size", "refuses"), [(2, 1, False), (1, 1, True), (2, 2, True)])
def test_a_model_that_drafts_is_cut_as_the_target_is(heads: int, size: int, refuses: bool) -> None:
    config = vllm_config({}, 8)
    config.speculative_config = SimpleNamespace(
        draft_model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
        draft_parallel_config=SimpleNamespace(tensor_parallel_size=size),
    )
    pages = pages_of(2, "strided-HNC")
    if refuses:
        assert "the model that drafts" in refused(pages, config)
    else:
        assert cut(config, Groups((FULL,), CHUNK), {FULL: pages}, shared=True).slices == 2


def test_scales_of_quantised_kv_must_agree() -> None:
    """One engine's numbers times another one's scales were other KV."""

    def layout(scale: Any) -> str:
        config = vllm_config({}, 8)
        layers = config.compilation_config.static_forward_context
        for name in ("a", "b"):
            layers[name] = SimpleNamespace(_k_scale=scale, _v_scale=torch.tensor(0.5))
        pages = pages_of(2, "strided-HNC", dtype="float8_e4m3fn")
        found = cut(config, Groups((FULL,), CHUNK), {FULL: pages}, shared=True)
        return found.layout if found.slices else found.why_alone

    assert layout(torch.tensor(1.0)) == layout(torch.tensor(1.0))
    assert layout(torch.tensor(1.0)) != layout(torch.tensor(1.5))
    assert "scales for each head" in layout(torch.ones(2))


def test_workers_that_do_not_agree_turn_it_off(make_rig: Make) -> None:
    def told(*layouts: str, slices: int = 2) -> dict[tuple[int, int], WorkerHello]:
        return {
            divmod(i, 2): WorkerHello(layout=layout, slices=slices)
            for i, layout in enumerate(layouts)
        }

    assert layout_of(told("a", "a", "b", "b")) == "a; b"
    assert layout_of(told("a", "a", "a", "a")) == "a; a", "stages of a pipeline are told apart"
    assert layout_of(told("a", "a", slices=0)) == "a; a"
    assert layout_of(dict(reversed(told("a", "b", slices=0).items()))) == "a; b"
    with pytest.raises(Incompatible, match="ranks keep different KV: a and b"):
        layout_of(told("a", "b"))
    mixed = {**told("a"), (0, 1): WorkerHello(layout="a", why_alone="its pages lie apart")}
    rig = make_rig(ranks=2)
    held = rig.workers[0].hello().held
    rig.side.introduce({rank: replace(hello, held=held) for rank, hello in mixed.items()})
    assert rig.ask(prompt(100)) == 0
    assert "differently (its pages lie apart)" in rig.state()["requests"][-1]["miss"]
    rig.check()


def test_vllm_is_asked_for_heads_before_tokens() -> None:
    for extra, latent, layout in ((SHARE, False, "LBHNC"), (SHARE, True, None), ({}, False, None)):
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
            model_config=SimpleNamespace(use_mla=latent),
        )
        assert KVStrataConnector.get_required_kvcache_layout(config) == layout


# in the scheduler


@pytest.mark.parametrize(("heads", "writers", "readers"), SIZES)
def test_one_size_reads_what_another_wrote(
    make_rig: Make, heads: int, writers: int, readers: int
) -> None:
    first = make_rig(heads=heads, ranks=writers, extra=SHARE)
    other = beside(make_rig, first, heads=heads, ranks=readers)
    tokens, whole = prompt(300), 300 // CHUNK * CHUNK
    first.warm(tokens)
    slices = math.gcd(heads, 8)
    assert first.side._lookups.parts == other.side._lookups.parts == list(range(slices))
    assert first.state()["host"]["num_objects"] == slices * whole // CHUNK
    assert other.ask(tokens, 3) == whole
    other.check()
    # And what that one adds is of use to the first.
    longer = [*tokens, *prompt(90, seed=4)]
    other.warm(longer, max_tokens=3)
    assert first.ask(longer, 3) == 390 // CHUNK * CHUNK
    assert first.state()["host"]["num_objects"] == slices * (390 // CHUNK)
    assert (first.failed, other.failed) == ([], [])
    first.check()


@pytest.mark.parametrize("share", ["none", "ranks"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 4)])
def test_sizes_meet_only_where_both_are_told_to(
    make_rig: Make, share: str, sizes: tuple[int, int]
) -> None:
    one, two = sizes
    first = make_rig(heads=4, ranks=one, extra={"share": share})
    for size, told, meet in (
        (two, share, share == "ranks"),
        (two, "none", False),
        (one, share, True),
        (one, "ranks", share == "ranks"),
    ):
        tokens = prompt(200, seed=len(first.steps))
        first.warm(tokens)
        other = beside(make_rig, first, heads=4, ranks=size, extra={"share": told})
        assert (other.ask(tokens, 3) > 0) is meet, (size, told)
        other.check()
    first.check()


def test_a_rank_alone_stores_what_it_always_did(make_rig: Make) -> None:
    """An object of all its heads, under its own number."""
    rig = make_rig(heads=4, ranks=2)
    assert rig.side._lookups.parts == [0, 1]
    told = rig.workers[1].hello()
    assert told.layout == "full 2 layers, 2 states, 2 heads of 2, bfloat16"
    assert (told.slices, told.why_alone) == (0, "")
    tokens = prompt(2 * CHUNK)
    rig.warm(tokens)
    (space,) = rig.state()["namespaces"]
    assert (space["parts"]["tensor_parallel"], space["parts"]["slices"]) == (2, 0)
    for part, header in enumerate(headers(rig, tokens)):
        assert (header.rank, header.shape) == (part, (2, 2, 2, 2, BLOCK, 2))
    rig.check()


@contextlib.contextmanager
def slots(rig: Rig, tokens: list[int]) -> Iterator[tuple[Any, list[int]]]:
    """The pool, and the slots of a prompt's whole chunks, in each part by part."""
    lookups, keys = rig.side._lookups, state_of(rig, tokens).keys
    assert rig.node is not None
    with contextlib.closing(rig.node.connect()) as client:
        matched = client.match(keys, lookups.parts, lookups.orders, lookups.lengths).wait(TIMEOUT_S)
        assert len(matched.tiers) == len(keys)
        yield client.pool, list(offsets_of(matched.offsets))
        client.release(matched.lease)


def headers(rig: Rig, tokens: list[int]) -> list[ObjectHeader]:
    """Of the objects of a prompt's first chunk, part by part."""
    with slots(rig, tokens) as (pool, offsets):
        first = offsets[: len(rig.side._lookups.parts)]
        return [header_of(pool.view(offset, HEADER_BYTES)) for offset in first]


def test_objects_of_every_size_are_alike(make_rig: Make) -> None:
    first = make_rig(heads=4, ranks=1, extra=SHARE)
    other = beside(make_rig, first, heads=4, ranks=4)
    tokens = prompt(2 * CHUNK)
    first.warm(tokens)
    one = headers(first, tokens)
    assert [header.rank for header in one] == [0, 1, 2, 3]
    assert {header.shape for header in one} == {(2, 2, 2, 1, BLOCK, 2)}
    node = first.node
    assert node is not None
    client = node.connect()
    client.clear()
    client.close()
    other.warm(tokens)
    two = headers(other, tokens)
    for was, now in zip(one, two, strict=True):
        assert (was.key, was.order, was.raw_checksum) == (now.key, now.order, now.raw_checksum)
    for rig in (first, other):
        (space, *_) = rig.state()["namespaces"]
        assert (space["parts"]["tensor_parallel"], space["parts"]["slices"]) == (1, 4)
        rig.check()


def test_a_head_that_several_ranks_have_is_stored_by_the_first(make_rig: Make) -> None:
    rig = make_rig(heads=2, ranks=4, extra=SHARE)
    rig.ask(prompt(200))
    assert [bool(worker._transfers.stores._jobs) for worker in rig.workers] == [
        True,
        False,
        True,
        False,
    ]
    rig.check()


def test_a_chunk_without_one_slice_is_absent(make_rig: Make) -> None:
    first = make_rig(heads=4, ranks=2, extra=SHARE)
    other = beside(make_rig, first, heads=4, ranks=1)
    transfers = first.workers[1]._transfers
    gone = max(transfers._payloads)
    payloads = transfers._payloads[gone]
    payloads.stores = False
    tokens = prompt(200)
    first.warm(tokens)
    assert first.state()["host"]["num_objects"] == 3 * (200 // CHUNK)
    assert other.ask(tokens, 3) == 0
    # It stores that one alone, and then all is there.
    other.settle()
    assert first.state()["host"]["num_objects"] == 4 * (200 // CHUNK)
    assert first.ask(tokens, 3) == 200 // CHUNK * CHUNK
    for rig in (first, other):
        rig.check()


@pytest.mark.parametrize("kinds", [("full", "window"), ("window",), ("piece", "full")])
def test_windows_are_cut_like_the_rest(make_rig: Make, kinds: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"heads": 4, "kinds": kinds, "num_blocks": 160}
    first = make_rig(ranks=2, extra=SHARE, **options)
    other = beside(make_rig, first, ranks=4, **options)
    assert other.side._lookups.parts == [
        group << 16 | rank for group in range(len(kinds)) for rank in range(4)
    ]
    tokens = prompt(300)
    first.warm(tokens)
    assert other.ask(tokens, 3) == 299 // CHUNK * CHUNK
    assert other.failed == []
    for rig in (first, other):
        rig.check()


def test_latents_are_shared_by_every_size(make_rig: Make) -> None:
    first = make_rig(kinds=("latent",), heads=None, ranks=1, extra=SHARE)
    other = beside(make_rig, first, kinds=("latent",), ranks=2)
    tokens = prompt(200)
    first.warm(tokens)
    assert other.ask(tokens, 3) == 200 // CHUNK * CHUNK
    for rig in (first, other):
        rig.check()


def test_recurrent_states_stay_with_their_size(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"kinds": ("full", "state"), "num_blocks": 160}
    extra = {**SHARE, "chunk_tokens": BLOCK}
    first = make_rig(ranks=1, extra=extra, **options)
    other = beside(make_rig, first, ranks=2, extra=extra, **options)
    assert "engines of more or fewer ranks: ranks cut a recurrent state" in caplog.text
    tokens = prompt(200)
    first.warm(tokens)
    assert other.ask(tokens, 3) == 0
    other.settle()
    for rig in (first, other):
        rig.reset()
        assert rig.ask(tokens, 3) == 199 // BLOCK * BLOCK, "its own it has"
        rig.check()


def test_from_a_slower_tier(make_rig: Make) -> None:
    first = make_rig(heads=4, ranks=2, extra=SHARE, make_node=tiered(GatedTier()))
    other = beside(make_rig, first, heads=4, ranks=1)
    tokens = prompt(300)
    first.warm(tokens)
    first.drop_host()
    assert other.ask(tokens, 3) == 300 // CHUNK * CHUNK
    assert record(other)["slower_tokens"] == 300 // CHUNK * CHUNK
    for rig in (first, other):
        rig.check()


def test_a_payload_without_blocks_is_packed_slice_by_slice(make_rig: Make) -> None:
    """As it comes from a tier with a lossy codec."""
    # What is written over may not be just being verified.
    first = make_rig(heads=16, ranks=1, extra={**SHARE, "host.verify_every": 0})
    other = beside(make_rig, first, heads=16, ranks=2)
    tokens = prompt(3 * CHUNK)
    first.warm(tokens)
    with slots(first, tokens) as (pool, offsets):
        assert len(offsets) == 3 * 8
        for offset in offsets:
            as_portable(first, pool, offset)
    assert other.ask(tokens, 3) == 3 * CHUNK
    assert all(one.read_portable for worker in other.workers for one in worker.payloads.values())
    for rig in (first, other):
        rig.check()


def test_to_the_last_token(make_rig: Make) -> None:
    """Tails, and chunks that a prompt parts from."""
    extra = {**SHARE, "inside": "on"}
    first = make_rig(heads=4, ranks=4, extra=extra)
    other = beside(make_rig, first, heads=4, ranks=2, extra=extra)
    tokens = prompt(2 * CHUNK + 25)
    first.warm(tokens)
    for asked, loaded in (
        ([*tokens[: CHUNK + 20], *range(9000, 9040)], CHUNK + 16),
        ([*tokens, *range(9000, 9040)], 2 * CHUNK + 25),
    ):
        other.add(asked, 3)
        other.run()
        assert record(other)["loaded_tokens"] == loaded
        other.reset()
    for rig in (first, other):
        rig.check()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (4, 2)])
def test_prefill_in_one_size_and_decode_in_another(make_rig: Make, sizes: tuple[int, int]) -> None:
    one, two = sizes
    first = make_rig(heads=4, ranks=one, extra={**SHARE, "network.listen": "127.0.0.1:0"})
    second = make_rig(
        heads=4, ranks=two,
        extra={**SHARE, "peer.named": "loopback", "peer.lookup_timeout": "1s"},
    )  # fmt: skip
    pair = Pair(first, second)
    tokens = prompt(5 * CHUNK + 7)
    decode(pair, tokens, prefill(pair, tokens))
    assert record(second)["loaded_tokens"] == len(tokens)
    pair.settle()


def test_a_load_s_bytes_are_all_of_a_rank(make_rig: Make) -> None:
    """What a synchronous load takes is reckoned by them, however many objects they are."""
    alone, shared = make_rig(heads=4, ranks=2), make_rig(heads=4, ranks=2, extra=SHARE)
    assert alone.side._chunk_bytes == shared.side._chunk_bytes == 2 * CHUNK * 8 * 2
    assert max(shared.side._lookups.lengths) == alone.side._chunk_bytes // 2


@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_two_sizes_gives_right_answers(make_rig: Make, seed: int) -> None:
    """Shared beginnings, few blocks, little memory, aborts, both engines at once."""
    choose = random.Random(seed)
    heads = choose.choice([2, 4])
    tier = tiered(GatedTier()) if seed % 2 else None
    options: dict[str, Any] = {
        "heads": heads, "num_blocks": 48, "max_num_batched_tokens": 96, "max_num_seqs": 4,
    }  # fmt: skip
    extra = {**SHARE, "host.capacity": "1MiB", "inside": choose.choice(["on", "off"])}
    first = make_rig(ranks=1, extra=extra, make_node=tier, pipelined=bool(seed % 2), **options)
    second = beside(make_rig, first, ranks=choose.choice([2, 4]), extra=extra, **options)
    alive: list[tuple[Rig, str]] = []
    for _ in range(160):
        rig, action = choose.choice((first, second)), choose.random()
        if action < 0.25:
            stem = prompt(200, seed=choose.randrange(4))[: choose.randrange(1, 200)]
            tail = prompt(choose.randrange(1, 60), seed=choose.randrange(9))
            alive.append((rig, rig.add([*stem, *tail], choose.randrange(1, 30))))
        elif action < 0.3 and alive:
            where, name = alive.pop(choose.randrange(len(alive)))
            where.abort(name)
        elif action < 0.35:
            rig.scheduler.reset_prefix_cache()
        else:
            rig.step()
    for rig in (first, second):
        rig.run()
        assert rig.num_external > 0
        assert rig.failed == []
    for rig in (first, second):
        rig.check()
