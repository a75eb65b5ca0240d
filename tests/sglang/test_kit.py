"""The storage under SGLang's own tree, controller, pools and threads, on a real node."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, of what it finds on this machine
    pytest.importorskip("sglang")
    import torch
    from tests.sglang.kit import Kit, kind
from tests.sglang.place import Place

from kvstrata.connectors.sglang.plugin import UPDATES, missing

KINDS = ("full", "swa", "mamba", "mla")
LAYOUTS = ("layer_first", "page_first", "page_first_direct")

Kits = Callable[..., Kit]


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    # Nothing is to be missed for the sake of a busy machine.
    with Place(tiny_llama, {"host.capacity": "128MiB", "deadlines.request": "20s"}) as made:
        made.node  # noqa: B018  (it is up)
        yield made
        made.check()


@pytest.fixture
def kits(place: Place, tiny_llama: Path) -> Iterator[Kits]:
    """Makes kits whose KV is kept apart from that of other tests."""
    made: list[Kit] = []
    tenant = os.urandom(8).hex()

    def make(what: Any, **more: Any) -> Kit:
        settings = {**place._settings, "tenant": tenant}
        made.append(Kit(what, tiny_llama, settings, **more))
        return made[-1]

    yield make
    for kit in made:
        kit.doCleanups()


@pytest.mark.parametrize("buffered", [False, True], ids=["cache", "buffer_only"])
@pytest.mark.parametrize("page_tokens", [64, 128])
@pytest.mark.parametrize("name", KINDS)
def test_what_one_stores_another_loads_bit_by_bit(
    kits: Kits, name: str, page_tokens: int, buffered: bool
) -> None:
    kit = kits(kind(name, page_tokens), buffered=buffered)
    tokens = kit.tokens(6)
    stored = kit.cache(1).store(tokens)
    consumer = kit.cache(2)
    assert consumer.prefetch(tokens) == len(tokens)
    loaded = consumer.loaded(tokens)
    assert list(loaded) == list(stored)
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


@pytest.mark.parametrize("buffered", [False, True], ids=["cache", "buffer_only"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
@pytest.mark.parametrize("name", ["full", "swa"])
def test_float8_comes_back_bit_by_bit(kits: Kits, name: str, layout: str, buffered: bool) -> None:
    """SGLang keeps it as bytes, whichever float8 it is."""
    kit = kits(kind(name, 64, dtype=torch.float8_e4m3fn), layout=layout, buffered=buffered)
    tokens = kit.tokens(4)
    stored = kit.cache(1).store(tokens)
    consumer = kit.cache(2)
    assert consumer.pool.dtype == torch.uint8
    assert consumer.prefetch(tokens) == len(tokens)
    loaded = consumer.loaded(tokens)
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


@pytest.mark.parametrize("name", KINDS)
def test_what_follows_is_stored_and_found_behind_what_was(kits: Kits, name: str) -> None:
    kit = kits(kind(name, 64))
    producer, tokens = kit.cache(1), kit.tokens(9, more=20)
    for pages in (3, 5, 9):
        stored = producer.store(tokens[: pages * 64])
    consumer = kit.cache(2)
    assert consumer.prefetch(tokens) == 9 * 64
    loaded = consumer.loaded(tokens)
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


def test_of_prompts_that_part_what_follows_is_loaded_behind_what_is_here(kits: Kits) -> None:
    kit = kits(kind("full", 64))
    common = kit.tokens(3)
    one, other = common + kit.tokens(2, seed=1), common + kit.tokens(3, seed=2)
    producer, consumer = kit.cache(1), kit.cache(2)
    stored = [producer.store(tokens)["kv"] for tokens in (one, other)]
    for tokens, expected in zip((one, other), stored, strict=True):
        assert consumer.prefetch(tokens) == len(tokens)
        assert torch.equal(consumer.loaded(tokens)["kv"], expected)
    assert consumer.prefetch(kit.tokens(4, seed=3)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["full", "mla"])
def test_a_page_is_the_same_in_every_layout(kits: Kits, name: str, layout: str) -> None:
    what = kind(name, 64)
    writer = kits(what, layout=layout).cache()
    reader = kits(what, layout="layer_first").cache()
    tokens = kits(what).tokens(5)
    hashes, indices = writer.hashes(tokens), writer.host_pages(5, first=2)
    writer.fill_host(7)
    assert writer.storage.batch_set_v1(hashes, indices) == [True] * 5
    for other in (writer, reader):
        other.fill_host(8)
        there = other.host_pages(5, first=4)
        assert other.storage.batch_exists(hashes) == 5
        assert other.storage.batch_get_v1(hashes, there) == [True] * 5
    writer_pages, reader_pages = (
        torch.stack([_by_token(cache.pool, at) for at in there[::64].tolist()])
        for cache in (writer, reader)
    )
    assert torch.equal(writer_pages, reader_pages)
    writer.fill_host(7)
    expected = torch.stack([_by_token(writer.pool, at) for at in indices[::64].tolist()])
    assert torch.equal(reader_pages, expected)


def _by_token(pool: Any, index: int) -> Any:
    """A page as SGLang's own views of its layers have it: (layers, states, bytes of the tokens)."""
    rows = []
    for layer in range(pool.layer_num):
        if hasattr(pool, "k_data_refs"):
            views = [pool.k_data_refs[layer], pool.v_data_refs[layer]]
        elif pool.layout == "page_first_direct":
            views = [pool.kv_buffer[:, layer]]
        else:
            views = [pool.data_refs[layer]]
        pages = [
            view[index // 64] if pool.layout == "page_first_direct" else view[index : index + 64]
            for view in views
        ]
        rows.append(torch.stack([one.contiguous().view(torch.uint8).flatten() for one in pages]))
    return torch.stack(rows)


@pytest.mark.parametrize("hole", [0, 1, 3, 5])
def test_what_is_before_a_hole_is_kept(kits: Kits, place: Place, hole: int) -> None:
    kit = kits(kind("full", 64))
    producer, consumer, tokens = kit.cache(1), kit.cache(2), kit.tokens(6)
    stored = producer.store(tokens)["kv"]
    place.node.clear([producer.keys(producer.hashes(tokens))[hole]])
    assert consumer.prefetch(tokens) == hole * 64
    if hole:
        assert torch.equal(consumer.loaded(tokens[: hole * 64])["kv"], stored[: hole * 64])
    again = kit.cache(3)
    again.fill(1)
    again.store(tokens)
    assert kit.cache(4).prefetch(tokens) == len(tokens), "the hole was filled"


def test_a_page_that_goes_between_the_question_and_the_read(kits: Kits, place: Place) -> None:
    cache = kits(kind("full", 64)).cache()
    tokens = kits(kind("full", 64)).tokens(6)
    hashes, indices = cache.hashes(tokens), cache.host_pages(6)
    cache.fill_host(1)
    before = cache.host_bytes(indices)
    cache.storage.batch_set_v1(hashes, indices)
    assert cache.storage.batch_exists(hashes) == 6
    place.node.clear(cache.keys(hashes))
    cache.fill_host(2)
    read = cache.storage.batch_get_v1(hashes, indices)
    kept = sum(read)
    assert read == [True] * kept + [False] * (6 - kept)
    assert torch.equal(cache.host_bytes(indices)[:kept], before[:kept]), "a lease holds bytes still"
    assert cache.storage.batch_exists(hashes) == 0


@pytest.mark.parametrize("name", ["swa", "mamba"])
def test_a_sidecar_that_is_missing_ends_the_prompt_where_it_can_be_gone_on_from(
    kits: Kits, name: str
) -> None:
    kit = kits(kind(name, 64))
    producer, consumer, tokens = kit.cache(1), kit.cache(2), kit.tokens(9)
    stored = producer.store(tokens[: 6 * 64])
    # Of the three pages behind there are keys and values, and nothing else.
    hashes = producer.hashes(tokens)
    assert producer.storage.batch_set_v1(hashes[6:], producer.host_pages(3)) == [True] * 3
    assert producer.storage.batch_exists(hashes) == 9
    assert consumer.prefetch(tokens) == 6 * 64
    loaded = consumer.loaded(tokens[: 6 * 64])
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


def test_a_prompt_goes_on_from_a_state_in_its_middle(kits: Kits) -> None:
    kit = kits(kind("mamba", 64))
    producer, consumer, tokens = kit.cache(1), kit.cache(2), kit.tokens(8)
    early = producer.store(tokens[: 3 * 64])
    producer.store(tokens)
    shorter = tokens[: 5 * 64]
    assert consumer.prefetch(shorter) == 3 * 64, "of five pages only the third has a state"
    assert torch.equal(consumer.loaded(tokens[: 3 * 64])["mamba"], early["mamba"])


@pytest.mark.parametrize("name", ["full", "swa"])
def test_a_prompt_of_several_of_sglangs_batches(kits: Kits, name: str) -> None:
    what = kind(name, 64, kv_size=300 * 64, max_context_len=300 * 64, num_layers=4,
                full_attention_layer_ids=(1, 3))  # fmt: skip
    kit = kits(what)
    tokens = kit.tokens(270, more=9)
    stored = kit.cache(1).store(tokens)
    consumer = kit.cache(2)
    assert consumer.prefetch(tokens) == 270 * 64
    loaded = consumer.loaded(tokens)
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


def wrapped_by_another(method: Any) -> Any:
    @functools.wraps(method)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        return method(*arguments, **options)

    return wrapper


def test_without_a_hook_nothing_may_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager as Updater,
    )

    assert missing() == ""
    owners = [(Updater, name) for name in UPDATES]
    owners += [(Scheduler, "flush_cache"), (Scheduler, "init_model_worker")]
    for owner, name in owners:
        hooked = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, hooked.__wrapped__)
            assert "plugin is not active" in missing()
            # What others wrap it in counts for nothing, and hides nothing.
            patch.setattr(owner, name, wrapped_by_another(hooked.__wrapped__))
            assert "plugin is not active" in missing()
            patch.setattr(owner, name, wrapped_by_another(hooked))
            assert missing() == ""
            patch.delattr(owner, name)
            assert f"no {owner.__name__}.{name}" in missing()
        assert missing() == ""


@pytest.mark.parametrize("name", ["full", "mla"])
def test_ranks_have_parts_of_their_own_unless_they_hold_the_same(kits: Kits, name: str) -> None:
    kit = kits(kind(name, 64))
    cache, tokens = kit.cache(), kit.tokens(6)
    ranks = [cache.storage_of(rank, 2) for rank in range(2)]
    hashes, indices, there = cache.hashes(tokens), cache.host_pages(6), cache.host_pages(6, 8)
    cache.fill_host(1)
    stored = [cache.host_bytes(indices)] * 2
    assert ranks[0].batch_set_v1(hashes, indices) == [True] * 6
    counts = [6, 6]
    if name == "full":
        # Of the other rank's part two pages are gone.
        assert ranks[1].batch_exists(hashes) == 0
        cache.fill_host(2)
        stored[1] = cache.host_bytes(indices)
        assert ranks[1].batch_set_v1(hashes[:4], indices[: 4 * 64]) == [True] * 4
        counts = [6, 4]
    for storage, count, expected in zip(ranks, counts, stored, strict=True):
        assert storage.batch_exists(hashes) == count
        cache.fill_host(3)
        assert storage.batch_get_v1(hashes, there) == [True] * count + [False] * (6 - count)
        assert torch.equal(cache.host_bytes(there)[:count], expected[:count])
