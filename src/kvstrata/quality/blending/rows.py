"""A prompt's KV of which some rows are computed anew, by the model's own forward.

The cache holds the whole prompt before the model reads anything. Of each layer the tokens that are
read write their rows, and then attend to all that lies before them, computed anew or not. It is
what an engine computes when each run of tokens is a sequence of its own over one block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstrata.blend import turn
from kvstrata.codecs.elements import Floats, from_float32, to_float32
from kvstrata.errors import UsageError
from kvstrata.layout import Elements
from kvstrata.quality.models import DTYPE, Model

CHECK_LAYER = 1
"""Where loaded and computed KV are compared: the first layer whose KV depends on other tokens."""

_TRIED = (3, 40, 700)  # positions that turning is tried between
_TOLERANCE = 1e-3  # of the largest number of a key
# Whether a key's neighbours are turned together, and whether it is neighbours in the model's table
# that are alike; else halves. Nothing in a configuration says so.
_FORMS = ((False, False), (True, False), (True, True))


def recompute(
    model: Model,
    kv: Elements,
    ids: Sequence[int],
    chosen: Sequence[int],
    positions: Sequence[int] | None = None,
) -> Elements:
    """The KV with the rows of some tokens computed anew over all before them.

    Args:
        kv: (L, 2, H, T, D), words of bfloat16, of all the tokens that there are.
        ids: (T,), of the same.
        chosen: places of the tokens to compute, ascending.
        positions: (T,), ascending; None: tokens stand side by side, as in a whole prompt.
    Returns:
        The same of new rows, rounded; a copy.
    """
    cache = _Rows(model, kv, chosen)
    if len(chosen):
        _read(model, cache, ids, chosen, positions)
    return cache.words()


def deviation(model: Model, kv: Elements, ids: Sequence[int], reused: Sequence[range]) -> Floats:
    """How much each reused token's KV differs from what it would be here, seen at `CHECK_LAYER`.

    Args:
        kv: (L, 2, H, T, D), words of bfloat16, of the whole prompt, as it was loaded.
        ids: of the whole prompt.
        reused: positions.
    Returns:
        The squared difference of keys and values, of all heads together, for each reused token.
    Source: CacheBlend, arXiv:2405.16444.
    """
    cache = _Rows(model, kv, range(len(ids)), stop=CHECK_LAYER)
    with suppress(_Stop):
        _read(model, cache, ids, range(len(ids)))
    loaded = to_float32(np.ascontiguousarray(kv[CHECK_LAYER]), DTYPE)
    squares = ((cache.stopped - loaded) ** 2).sum(axis=(0, 1, 3), dtype=np.float32)
    places = np.concatenate([np.arange(0), *(np.arange(r.start, r.stop) for r in reused)])
    found: Floats = squares[places]
    return found


class Turning:
    """Turns a model's keys from position to position, by the model's own rotary embedding.

    It is proven first, on every layer: a token that sees nothing but itself has the same state
    wherever it stands, so that its keys at two positions must be turned copies of each other.

    Raises:
        UsageError: the model's keys cannot be turned like that, in words.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        if set(model.layer_types) != {"full_attention"}:
            kinds = ", ".join(sorted(set(model.layer_types)))
            raise UsageError(f"blending takes layers of full attention alone, not {kinds}")
        alone = [self._alone(position) for position in _TRIED]
        for self._interleaved, self._paired in _FORMS:
            if self._proven(alone):
                return
        raise UsageError("turning the model's keys does not give those of other positions")

    def turned(
        self, kv: Elements, was: npt.NDArray[np.int64], now: npt.NDArray[np.int64]
    ) -> Elements:
        """The KV at other positions: keys turned and rounded once, values as they are.

        Args:
            kv: (L, 2, H, T, D), words of bfloat16.
            was, now: (T,), positions.
        """
        turned: Elements = kv.copy()
        keys = to_float32(np.ascontiguousarray(kv[:, 0]), DTYPE)
        self._turn(keys, was, now)
        words = np.empty(keys.shape, np.uint16)
        from_float32(keys, DTYPE, words)
        turned[:, 0] = words
        return turned

    def _turn(self, keys: Floats, was: npt.NDArray[np.int64], now: npt.NDArray[np.int64]) -> None:
        turn(keys, self._table(was), self._table(now), interleaved=self._interleaved)

    def _table(self, positions: npt.NDArray[np.int64]) -> Floats:
        """(T, R), R/2 cosines and R/2 sines of each position."""
        torch = self._model.torch
        rotary = getattr(self._model.base, "rotary_emb", None)
        if rotary is None:
            raise UsageError("the model has no rotary embedding, so its keys cannot be turned")
        with torch.inference_mode():
            cos, sin = rotary(
                torch.zeros(1, device=self._model.device),
                torch.from_numpy(positions[None]).to(self._model.device),
            )
        part = slice(0, None, 2) if self._paired else slice(0, cos.shape[-1] // 2)
        rows: Floats = torch.cat([cos[0][:, part], sin[0][:, part]], -1).float().cpu().numpy()
        return rows

    def _alone(self, position: int) -> Floats:
        """float32 KV of some tokens that each stand at a position and see only themselves."""
        model = self._model
        ids = list(range(10, 26))
        cache = _Rows(model, None, range(len(ids)))
        place = np.arange(len(ids))
        model.read(cache, ids, place, np.full(len(ids), position), 0, [0], place)
        return cache.floats()

    def _proven(self, alone: Sequence[Floats]) -> bool:
        first, *others = alone
        for position, found in zip(_TRIED[1:], others, strict=True):
            keys = first[:, 0].copy()
            places = np.full(keys.shape[2], position)
            self._turn(keys, np.full_like(places, _TRIED[0]), places)
            if np.abs(keys - found[:, 0]).max() > _TOLERANCE * np.abs(found[:, 0]).max():
                return False
            if np.abs(first[:, 1] - found[:, 1]).max() > _TOLERANCE * np.abs(found[:, 1]).max():
                return False
        return True


class _Stop(Exception):
    """Enough was seen."""


class _Rows:
    """As much of transformers' cache as a forward asks for; holds all of a prompt from the start.

    Args:
        model: that will read.
        kv: (L, 2, H, T, D), words of bfloat16; None: nothing but what will be read.
        chosen: places that are read, all of them at once.
        stop: layer at which reading ends, once its KV is known.
    """

    is_compileable = False
    is_sliding: Sequence[bool] = ()

    def __init__(
        self, model: Model, kv: Elements | None, chosen: Sequence[int], stop: int | None = None
    ) -> None:
        self._model = model
        self._kv = kv
        self._chosen = np.asarray(chosen, np.int64)
        self._places = model.torch.from_numpy(self._chosen).to(model.device)
        self._stop = stop
        self._new: list[Any] = []
        self.stopped: Floats = np.empty(0, np.float32)

    def get_seq_length(self, layer: int = 0) -> int:
        """Nothing: masks come from outside."""
        return 0

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Put the read tokens' rows in their places; the whole of the layer comes back."""
        torch = self._model.torch
        new = torch.cat([keys, values])
        if layer == self._stop:
            self.stopped = new.float().cpu().numpy()
            raise _Stop
        self._new.append(new)
        if self._kv is None:
            return keys, values
        words = torch.from_numpy(np.ascontiguousarray(self._kv[layer]).view(np.int16))
        whole = words.view(torch.bfloat16).to(self._model.device, torch.float32)
        whole[:, :, self._places] = new
        return whole[:1], whole[1:]

    def floats(self) -> Floats:
        """(L, 2, H, len(chosen), D) of what was read."""
        numbers: Floats = self._model.torch.stack(self._new).float().cpu().numpy()
        return numbers

    def words(self) -> Elements:
        """(L, 2, H, T, D), words of bfloat16, of the whole prompt as it now is."""
        assert self._kv is not None
        whole: Elements = self._kv.copy()
        if not self._new:
            return whole
        numbers = np.ascontiguousarray(self.floats())
        rounded = np.empty(numbers.shape, np.uint16)
        from_float32(numbers, DTYPE, rounded)
        whole[:, :, :, self._chosen] = rounded
        return whole


def _read(
    model: Model,
    cache: _Rows,
    ids: Sequence[int],
    chosen: Sequence[int],
    positions: Sequence[int] | None = None,
) -> None:
    position = np.asarray(range(len(ids)) if positions is None else positions, np.int64)
    new = np.asarray(chosen, np.int64)
    read = [ids[place] for place in chosen]
    model.read(cache, read, np.full(len(ids), -1), position, 0, [len(read) - 1], new)
