"""Where a recurrent state's bytes are, proven through the tensors that a layer's kernels use."""

from __future__ import annotations

import dataclasses
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
)

from kvstrata.connectors.vllm.states import describe_states, prove_states
from kvstrata.errors import LayoutMismatch

NUM_BLOCKS, PADDED = 5, 4096
NAMES = ["model.layers.2.mixer", "model.layers.10.mixer"]
SPEC = MambaSpec(
    block_size=32,
    shapes=((3, 64), (4, 8, 16)),
    dtypes=(torch.bfloat16, torch.float32),
    page_size_padded=PADDED,
    mamba_cache_mode="align",
)
NBYTES = 3 * 64 * 2 + 4 * 8 * 16 * 4


class Engine:
    """What vLLM has of such a group: one memory, views of it, layers that have unpacked them."""

    def __init__(self, spec: MambaSpec = SPEC) -> None:
        self.memory = torch.randint(0, 64, (len(NAMES) * NUM_BLOCKS * PADDED,), dtype=torch.int8)
        size = spec.state_content_size_bytes
        self.caches = {
            name: self.memory.as_strided(
                (NUM_BLOCKS, 1, 1, size), (PADDED, size, size, 1), i * NUM_BLOCKS * PADDED
            )
            for i, name in enumerate(NAMES)
        }
        self.layers: dict[str, Any] = {
            name: SimpleNamespace(kv_cache=unpacked(cache, spec))
            for name, cache in self.caches.items()
        }
        self.config = KVCacheConfig(
            num_blocks=NUM_BLOCKS,
            kv_cache_tensors=[KVCacheTensor(self.memory.numel(), NAMES, 0, PADDED)],
            kv_cache_groups=[KVCacheGroupSpec(NAMES[::-1], spec)],
        )
        self.vllm: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))

    def describe(self) -> Any:
        return describe_states(self.caches, self.vllm, self.config, 0)


def unpacked(cache: torch.Tensor, spec: MambaSpec) -> tuple[torch.Tensor, ...]:
    """As `MambaBase.bind_kv_cache`."""
    pages, states, offset = cache.squeeze((1, 2)), [], 0
    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
        nbytes = prod(shape) * dtype.itemsize
        states.append(pages[:, offset : offset + nbytes].view(dtype).view(-1, *shape))
        offset += nbytes
    return tuple(states)


def test_a_state_is_all_of_a_block_but_its_padding() -> None:
    engine = Engine()
    pages = engine.describe()
    assert pages.layer_names == ("model.layers.2.mixer", "model.layers.10.mixer")
    assert pages.page_bytes == NBYTES
    assert pages.strides.tolist() == [PADDED, PADDED]
    assert (pages.group.kind, pages.group.dtype) == ("recurrent", "float32")
    assert pages.group.head_dim * 4 == NBYTES
    before = engine.memory.clone()
    prove_states(pages, engine.caches, engine.layers)
    assert torch.equal(engine.memory, before), "restored"


@pytest.mark.parametrize("wrong", ["swapped", "elsewhere", "fewer", "another layer's"])
def test_other_bytes_than_the_kernels_use_are_seen(wrong: str) -> None:
    engine = Engine()
    pages = engine.describe()
    layer = engine.layers[NAMES[1]]
    if wrong == "swapped":
        layer.kv_cache = layer.kv_cache[::-1]
    elif wrong == "elsewhere":
        pages = dataclasses.replace(pages, bases=pages.bases + np.array([0, 64]))
    elif wrong == "fewer":
        layer.kv_cache = layer.kv_cache[:1]
    else:
        layer.kv_cache = engine.layers[NAMES[0]].kv_cache
    before = engine.memory.clone()
    with pytest.raises(LayoutMismatch):
        prove_states(pages, engine.caches, engine.layers)
    if wrong != "another layer's":
        assert torch.equal(engine.memory, before), "restored"


def test_the_name_of_the_order_pins_what_decides_it() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"shapes": ((64, 3), (4, 8, 16))},
        {"dtypes": (torch.float16, torch.float32)},
        {"mamba_cache_mode": "none"},
    ]
    names = {
        Engine(dataclasses.replace(SPEC, **change)).describe().order.name for change in changes
    }
    assert len(names) == len(changes)
    assert all(len(name) <= 64 and " " not in name for name in names)


def test_what_is_no_dense_run_is_refused() -> None:
    engine = Engine()
    engine.caches[NAMES[0]] = engine.caches[NAMES[0]].to(torch.int16)
    with pytest.raises(LayoutMismatch, match=r"model\.layers\.2"):
        engine.describe()
    engine = Engine()
    del engine.caches[NAMES[1]]
    with pytest.raises(LayoutMismatch, match="did not register"):
        engine.describe()
