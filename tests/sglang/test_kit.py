"""The storage under SGLang's own tree, controller, pools and threads, on a real node."""

from __future__ import annotations

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

KINDS = ("full", "swa", "mamba", "mla")
LAYOUTS = ("layer_first", "page_first", "page_first_direct")

Kits = Callable[..., Kit]


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    with Place(tiny_llama, {"host.capacity": "128MiB"}) as made:
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
