"""What keys are turned by, the proof that it is right, and how far reused rows are from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.connector.test_blends import blend
from tests.connector.test_turned import DIM, HEADS, LAYERS, Memory, turned_slowly
from tests.connector.test_turned import Table as FakeTable
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from kvstrata.connectors.vllm.deviation import Check
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.rotary import Rotary, find_rotary
from kvstrata.connectors.vllm.turned import words
from kvstrata.connectors.vllm.turns import FURTHER, NUM_TOKENS, TurningProof
from kvstrata.errors import CorruptObject, Incompatible


class SelfAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, *rotary: nn.Module) -> None:
        super().__init__()
        self.attn = nn.Identity()
        for number, one in enumerate(rotary):
            setattr(self, f"rotary_{number}", one)


def rope(head_dim: int = DIM, **parameters: Any) -> Any:
    known = {"rope_type": "default", "rope_theta": 10000.0, **parameters}
    with set_current_vllm_config(VllmConfig()):
        return get_rope(head_dim, max_position=128, rope_parameters=known, dtype=torch.float32)


def model_of(*layers: SelfAttention) -> tuple[nn.Module, dict[str, Any]]:
    return nn.ModuleList(layers), {f"layer {i}": one.attn for i, one in enumerate(layers)}


def test_layers_are_grouped_by_their_table() -> None:
    one, other = rope(), rope(rope_theta=500.0)
    model, layers = model_of(
        SelfAttention(one), SelfAttention(other), SelfAttention(), SelfAttention(one)
    )
    found = find_rotary(model, layers, DIM)
    assert [(rotary.layers, rotary.module) for rotary in found] == [((0, 3), one), ((1,), other)]


def test_a_table_is_read_as_it_is_now() -> None:
    module = rope()
    rotary = Rotary((0,), module)
    exact = rotary.rows(range(3, 7))
    assert exact.shape == (4, DIM)
    assert np.allclose(exact[2, : DIM // 2], np.cos(5 / 10000 ** (np.arange(DIM // 2) * 2 / DIM)))
    module.cos_sin_cache = module.cos_sin_cache.to(torch.bfloat16)
    assert (rotary.rows(range(3, 7)) != exact).any()


@pytest.mark.parametrize("positions", [range(120, 129), range(-1, 3), range(2000, 2001)])
def test_there_are_no_such_positions(positions: range) -> None:
    with pytest.raises(CorruptObject):
        Rotary((0,), rope()).rows(positions)


def test_what_is_not_known_is_refused() -> None:
    model, layers = model_of(SelfAttention(rope(), rope(rope_theta=500.0)))
    with pytest.raises(Incompatible, match="2 rotary"):
        find_rotary(model, layers, DIM)

    class Other(RotaryEmbeddingBase):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)

    model, layers = model_of(SelfAttention(Other()))
    with pytest.raises(Incompatible, match="Other"):
        find_rotary(model, layers, DIM)
    with pytest.raises(Incompatible, match="not found"):
        find_rotary(nn.ModuleList(), layers, DIM)


# the proof

BLOCKS, BLOCK_TOKENS = [5, 2, 9], 32


class Engine:
    """Computes a token's keys and values of its id, its layer and what it is told of positions."""

    def __init__(self, dtype: str = "float32") -> None:
        self.memory = Memory("cpu-vec", dtype, BLOCK_TOKENS, BLOCK_TOKENS)
        self.memory.blocks[:] = 0
        self.memory.blocks[:, BLOCKS] = 7
        self.before = self.memory.blocks.copy()
        self.table = FakeTable(DIM)
        self.turned = set(range(LAYERS))
        self.change: Callable[[torch.Tensor, int], Any] = lambda kv, at: None

    def compute(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        blocks: Sequence[int],
        *,
        told_further: int = 0,
    ) -> None:
        assert list(blocks) == BLOCKS
        assert list(positions) == list(range(NUM_TOKENS))
        rows = self.memory.rows(BLOCKS)
        for position, token in zip(positions, tokens, strict=True):
            rng = np.random.default_rng(token)
            kv = rng.normal(size=(LAYERS, 2, HEADS, DIM)).astype(np.float32)
            told = position + told_further
            for layer in self.turned:
                kv[layer, 0] = turned_slowly(kv[layer, 0], told, self.table, DIM)
            self.change(torch.from_numpy(kv), told)
            rows[:, :, :, position] = words(kv, self.memory.group.dtype)
        native = self.memory.order.pack_layers(rows, self.memory.group)
        self.memory.blocks[:, BLOCKS] = native

    def fails(self, *rotary: Rotary, num_positions: int = 2048) -> str:
        names = self.memory.pages.layer_names
        caches = {
            name: torch.from_numpy(layer)
            for name, layer in zip(names, self.memory.blocks, strict=True)
        }
        proof = TurningProof(self.memory.pages, caches, rotary, num_positions)
        why: str = proof.fails(self, Trial([7 + i for i in range(96)], BLOCKS))
        assert (self.memory.blocks == self.before).all(), "it left a trace"
        return why


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_that_turn_by_the_table(dtype: str) -> None:
    engine = Engine(dtype)
    assert engine.fails(Rotary((0, 1, 2), engine.table)) == ""


def test_a_model_of_few_positions() -> None:
    engine = Engine()
    assert engine.fails(Rotary((0, 1, 2), engine.table), num_positions=100) == ""
    assert engine.fails(Rotary((0, 1, 2), engine.table), num_positions=64)


def test_layers_that_do_not_turn() -> None:
    engine = Engine()
    engine.turned = {1}
    assert engine.fails(Rotary((1,), engine.table)) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_that_turns_otherwise_does_not_pass(layer: int, dtype: str) -> None:
    engine = Engine(dtype)
    others = tuple({0, 1, 2} - {layer})
    assert f"layer {layer} " in engine.fails(Rotary(others, engine.table))
    wrong = FakeTable(DIM, is_neox_style=False)
    assert f"layer {layer} " in engine.fails(Rotary(others, engine.table), Rotary((layer,), wrong))
    half = FakeTable(DIM // 2)
    assert f"layer {layer} " in engine.fails(Rotary(others, engine.table), Rotary((layer,), half))


@pytest.mark.parametrize("state", [0, 1])
def test_positions_that_are_learnt_do_not_pass(state: int) -> None:
    engine = Engine()

    def change(kv: torch.Tensor, told: int) -> None:
        kv[2, state] += 1.0 if told > FURTHER else 0.0

    engine.change = change
    assert "layer 2" in engine.fails(Rotary((0, 1, 2), engine.table))


def test_no_number_does_not_pass() -> None:
    engine = Engine()
    engine.change = lambda kv, told: kv[1].fill_(float("nan"))
    assert engine.fails(Rotary((0, 1, 2), engine.table))


# how far reused rows are off


class Impl:
    """Writes what it is given."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def do_kv_cache_update(self, *told: Any) -> None:
        self.written.append(told)


class StoppedForward:
    """Asks a layer to write the keys and values of the positions that it computes."""

    def __init__(self, impl: Impl, rows: torch.Tensor) -> None:
        self._impl, self._rows = impl, rows
        self.after = False
        self.asked: list[Any] = []

    def compute(self, tokens: Any, positions: Any, blocks: Any, *, compiled: bool) -> None:
        assert not compiled
        self.asked.append((list(tokens), positions, blocks))
        keys, values = self._rows[:, positions.start : positions.stop]
        self._impl.do_kv_cache_update(None, keys, values, None, None)
        self.after = True


def check_of(memory: Memory, forward: Any, impl: Impl) -> Check:
    """Of a model whose second layer has this implementation, and no other."""
    names = memory.pages.layer_names
    caches = {
        name: torch.from_numpy(layer) for name, layer in zip(names, memory.blocks, strict=True)
    }
    return Check(forward, memory.pages, caches, {names[1]: SimpleNamespace(impl=impl)})


@pytest.mark.parametrize("positions", [range(64), range(16, 40), range(33, 95), range(64, 65)])
def test_the_distance_of_keys_and_values(positions: range) -> None:
    """Of all heads, in the second layer, wherever the blocks are."""
    rows = torch.randn(2, 96, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    memory = Memory("cpu-vec", "float32", BLOCK_TOKENS, BLOCK_TOKENS)
    off = torch.zeros(2, 96, HEADS, DIM)
    off[0, 39, 1, 3], off[1, 39, 0, 5], off[1, 64, 1, 0] = 2.0, 3.0, -1.0
    reused = np.zeros((LAYERS, 2, HEADS, 96, DIM), np.float32)
    reused[1] = (rows + off).transpose(1, 2).numpy()
    native = memory.order.pack_layers(reused, memory.group)
    memory.blocks[:, BLOCKS] = native
    impl = Impl()
    forward = StoppedForward(impl, rows)
    one = replace(blend("r1", [], "deviation"), table=BLOCKS)
    found = check_of(memory, forward, impl).deviation(one, positions)
    wanted = {39: 13.0, 64: 1.0}
    assert np.allclose(found, [wanted.get(at, 0.0) for at in positions], atol=1e-4)
    tokens = [1000 + at for at in positions]
    assert forward.asked == [(tokens, positions, BLOCKS)]
    assert (memory.blocks[:, BLOCKS] == native).all()
    assert not impl.written
    assert not forward.after
    impl.do_kv_cache_update(1, 2)
    assert impl.written == [(1, 2)], "the layer writes again"


def test_a_layer_that_does_not_write_is_not_compared() -> None:
    impl = Impl()

    class Forward:
        def compute(self, *_: Any, **__: Any) -> None:
            pass

    memory = Memory("cpu-vec", "float32", BLOCK_TOKENS, BLOCK_TOKENS)
    one = replace(blend("r1", [], "deviation"), table=BLOCKS)
    with pytest.raises(Incompatible):
        check_of(memory, Forward(), impl).deviation(one, range(32))
    impl.do_kv_cache_update(1)
    assert impl.written == [(1,)]
