"""The proof of a forward: what it lets pass, what it does not, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.connector.fake_model import BLOCK, NAMES, Memory

from kvstrata.connectors.vllm.groups import Group
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.trial import Proof

TABLE = [5, 2, 9, 3]
COUNT = len(TABLE) * BLOCK
NUMBERS = (2, COUNT, 2, 2)
"""Of a layer, of tokens: its keys, then its values, of two numbers each."""


class Model:
    """Writes numbers that are known, or some of them otherwise."""

    def __init__(self) -> None:
        self.memory = Memory(16)
        self.caches = {
            name: torch.from_numpy(layer) for name, layer in zip(NAMES, self.memory.kv, strict=True)
        }
        rng = np.random.default_rng(0)
        self.numbers = torch.from_numpy(rng.normal(size=NUMBERS)).float()
        self.write(range(COUNT), self.numbers)
        self.others = self.memory.kv.copy()

    def write(self, positions: Sequence[int], numbers: torch.Tensor) -> None:
        rows = numbers.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
        for layer in range(len(NAMES)):
            for position in positions:
                place = TABLE[position // BLOCK], position % BLOCK
                self.memory.kv[layer][place] = rows[layer, position].reshape(-1)

    def proof(self) -> Proof:
        return Proof(self.memory.pages(Group(0, "full", BLOCK)), self.caches)


class Forward:
    """Computes what it is told to."""

    def __init__(self, model: Model, change: Callable[[torch.Tensor], Any]) -> None:
        self._model, self._change = model, change
        self.positions: list[list[int]] = []
        self.cuts: list[int] = []

    def compute(
        self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[int], cuts: Any
    ) -> None:
        assert list(blocks) == TABLE
        assert list(tokens) == [100 + position for position in positions]
        numbers = self._model.numbers.clone()
        self._change(numbers)
        self._model.write(positions, numbers)
        self.positions.append(list(positions))
        self.cuts = list(cuts)


TRIAL = Trial([100 + position for position in range(COUNT)], TABLE)


def tried(change: Callable[[torch.Tensor], Any]) -> str:
    model = Model()
    forward = Forward(model, change)
    why: str = model.proof().fails(forward, TRIAL)
    assert (model.memory.kv == model.others).all(), "it left a trace"
    return why


def test_the_same_passes_in_two_goes_and_many_cuts() -> None:
    model = Model()
    forward = Forward(model, lambda numbers: None)
    assert model.proof().fails(forward, TRIAL) == ""
    first, second = forward.positions
    assert first + second == list(range(COUNT))
    assert len(first) > 1 < len(second)
    assert len(set(forward.cuts)) > 5
    assert any(cut + 1 in forward.cuts for cut in forward.cuts), "a run of one token"


def test_rounding_passes() -> None:
    assert tried(lambda numbers: numbers.mul_(1.02)) == ""


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("state", [0, 1])
@pytest.mark.parametrize("token", [0, 17, COUNT - 1])
def test_one_tokens_keys_or_values_do_not(layer: int, state: int, token: int) -> None:
    def change(numbers: torch.Tensor) -> None:
        numbers[layer, token, state] = -numbers[layer, token, state] - 0.5

    assert f"layer {NAMES[layer]}" in tried(change)


def test_nothing_written_does_not() -> None:
    model = Model()
    idle = Forward(model, lambda numbers: None)
    idle.compute = lambda *_: None  # type: ignore[method-assign]
    assert model.proof().fails(idle, TRIAL)
    assert (model.memory.kv == model.others).all()


def test_no_number_does_not() -> None:
    assert tried(lambda numbers: numbers[1].fill_(float("nan")))


def test_what_fails_leaves_no_trace() -> None:
    def fail(numbers: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    model = Model()
    with pytest.raises(RuntimeError):
        model.proof().fails(Forward(model, fail), TRIAL)
    assert (model.memory.kv == model.others).all()
