"""By which tables an engine's layers turn their keys; those of its rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from kvstrata.errors import CorruptObject, Incompatible

Table = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rotary:
    """A table, and the layers that turn their keys by it.

    Args:
        layers: their numbers in a payload.
        module: the engine's rotary embedding.
    """

    layers: tuple[int, ...]
    module: Any

    @property
    def interleaved(self) -> bool:
        """Whether neighbours in a head are a pair."""
        return not self.module.is_neox_style

    def rows(self, positions: range) -> Table:
        """Cosines and sines: (T, R) float32.

        As the engine has them now: it casts its table when it first computes.

        Raises:
            CorruptObject: there are no such positions, so nothing can have been computed there.
        """
        table = self.module.cos_sin_cache
        if not 0 <= positions.start <= positions.stop <= len(table):
            raise CorruptObject(f"positions {positions}, where the model has {len(table)}")
        some = table[positions.start : positions.stop].float().cpu().numpy()
        return np.ascontiguousarray(some, np.float32)


def find_rotary(model: Any, layers: Mapping[str, Any], head_dim: int) -> list[Rotary]:
    """Which embeddings turn which layers' keys.

    A layer without one is taken to keep no positions in its keys; that this is so, and all else
    here, is for a test to prove.

    Args:
        model: the engine's.
        layers: its attention layers by name, in the order of a payload.
        head_dim: numbers of a head.
    Raises:
        Incompatible: an embedding is of a kind that is not known, or a layer has several.
    """
    above = {id(child): module for module in model.modules() for child in module.children()}
    found: dict[int, tuple[list[int], Any]] = {}
    for number, (name, layer) in enumerate(layers.items()):
        parent = above.get(id(layer))
        if parent is None:
            raise Incompatible(f"layer {name} was not found in the model")
        each = [one for one in parent.modules() if isinstance(one, RotaryEmbeddingBase)]
        if len(each) > 1:
            raise Incompatible(f"layer {name} has {len(each)} rotary embeddings")
        for one in each:
            _check(one, head_dim)
            found.setdefault(id(one), ([], one))[0].append(number)
    return [Rotary(tuple(numbers), one) for numbers, one in found.values()]


def _check(module: Any, head_dim: int) -> None:
    """Whether the table is what `kvstrata.blend.turn` takes.

    Raises:
        Incompatible: it is not.
    """
    table = getattr(module, "cos_sin_cache", None)
    width = getattr(module, "rotary_dim", 0)
    if table is None or table.ndim != 2 or table.shape[1] != width or not 0 < width <= head_dim:
        raise Incompatible(f"its rotary embedding {type(module).__name__} is not known")
