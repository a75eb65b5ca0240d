"""The engine's model, found by its callers or by what holds its layers; and nothing is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from kvstrata.connectors import modules
from kvstrata.connectors.modules import common_root
from kvstrata.connectors.vllm.engine import find_model
from kvstrata.errors import Incompatible


@pytest.fixture
def noted() -> Iterator[None]:
    there = list(modules._hooks)
    modules.register()
    modules.register()
    assert len(modules._hooks) == 1
    yield
    if not there:
        modules._hooks.pop().remove()


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(1, 1)
        self.nothing = None
        self.register_module("neither", None)


class Model(nn.Module):  # type: ignore[misc]
    """Its layers are in a list, that is in a module; and one more is added later."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        inner.layers = nn.ModuleList([Layer() for _ in range(3)])
        inner.layers.append(Layer())
        self.add_module("inner", inner)

    @property
    def layers(self) -> list[Any]:
        return [layer.attention for layer in self.inner.layers]

    def compute_logits(self) -> None: ...


def test_from_all_layers_it_is_climbed_to_what_nothing_holds(noted: None) -> None:
    one, other = Model(), Model()
    assert common_root(one.layers) is one
    assert common_root(other.layers[2:3]) is other
    assert common_root([one.layers[0], other.layers[0]]) is None
    assert common_root([]) is None
    # What holds a layer now counts, whoever held it before.
    other.add_module("taken", one.layers[0])
    assert common_root(one.layers) is None


def test_nothing_is_kept_alive(noted: None) -> None:
    gc.collect()
    before = len(modules._HOLDERS)
    model = Model()
    (layer, *_), gone = model.layers, weakref.ref(model)
    assert len(modules._HOLDERS) > before
    del model, _
    gc.collect()
    assert gone() is None
    # Its holder has gone, and is not taken for one.
    assert common_root([layer]) is layer
    del layer
    gc.collect()
    assert len(modules._HOLDERS) == before


def test_what_is_odd_is_registered_all_the_same(noted: None) -> None:
    class Equal(nn.Module):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return True

    holder = nn.Module()
    holder.odd = Equal()  # no key of a dictionary
    assert common_root([holder.odd]) is holder
    holder.below = nn.Module()
    holder.below.above = holder  # a circle
    assert common_root([holder]) in (holder, holder.below)


def test_what_a_module_says_of_itself_is_not_asked(noted: None) -> None:
    """A model that can be loaded without this can be loaded with it."""

    class Unready(nn.Module):  # type: ignore[misc]
        def __hash__(self) -> int:
            raise AttributeError("before it is whole")

    class Alike(nn.Module):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Alike)

        def __hash__(self) -> int:
            return 7

    one, other = nn.Module(), nn.Module()
    one.unready = Unready()
    assert common_root([one.unready]) is one
    one.alike, other.alike = Alike(), Alike()
    assert common_root([one.alike]) is one
    assert common_root([other.alike]) is other


class Runner:
    def __init__(self, model: Any) -> None:
        self.model = model

    def get_model(self) -> Any:
        return self.model

    def find(self, layers: list[Any]) -> Any:
        return find_model(layers)


def test_a_callers_model_goes_before_what_holds_the_layers(noted: None) -> None:
    model, other = Model(), Model()
    assert Runner(other).find(model.layers) is other
    assert find_model(model.layers) is model


def test_where_neither_is_known_it_is_said() -> None:
    layers = Model().layers
    with pytest.raises(Incompatible, match="model was not found"):
        find_model(layers)
    with pytest.raises(Incompatible, match="model was not found"):
        find_model([])


def test_what_holds_the_layers_and_is_no_model_is_none(noted: None) -> None:
    holder = nn.Module()
    holder.layer = nn.Linear(1, 1)
    assert common_root([holder.layer]) is holder
    with pytest.raises(Incompatible, match="model was not found"):
        find_model([holder.layer])
