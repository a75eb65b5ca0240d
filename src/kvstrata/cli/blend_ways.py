"""Ways of reuse that change a model's attention or its layers, as `kvstrata quality` measures them.

What they do is in `kvstrata.connectors.transformers`; here they meet the measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.errors import UsageError
from kvstrata.layout import Elements
from kvstrata.quality.blending.prompts import Prompt
from kvstrata.quality.blending.rows import recompute
from kvstrata.quality.blending.ways import Made, Way
from kvstrata.quality.models import Model

TEMPERATURES = ((1.0, 1.0), (0.9, 0.9), (0.8, 0.8))
"""Of attention to documents apart, and its scale; the first is parallel encoding by itself."""

KEPT = (0.15, 0.30)
"""Of the documents' tokens, those that a question keeps."""

COMPUTED_LAYERS = (0.0, 0.25, 0.5)
"""Shares of the layers that are computed above another fine-tune's."""


def further(model: Model, donor: Path | None = None) -> list[Way]:
    """The ways that this model can be asked for.

    Args:
        model: that is measured.
        donor: folder of another fine-tune of it, for `kvstrata.connectors.transformers.donation`.
    """
    apart = _Apart()
    found = [
        Way(f"ape T={temperature:g} S={scale:g}", 0.0, apart.way(temperature, scale))
        for temperature, scale in TEMPERATURES
    ]
    found += [Way("samkv", ratio, sparse(ratio), by_question=True) for ratio in KEPT]
    if donor is not None:
        other = _Donor(Model(donor))
        found += [
            Way("droidspeak", share, other.way(share), own_gap=True) for share in COMPUTED_LAYERS
        ]
    return found


class _Apart:
    """Documents encoded apart, once for a prompt."""

    def __init__(self) -> None:
        self._prompt: Prompt | None = None
        self._kv: Elements = np.empty(0, np.uint16)
        self._start = 0

    def way(self, temperature: float, scale: float) -> Callable[[Prompt, Sequence[int]], Made]:
        """Answers by this temperature and scale."""
        from kvstrata.connectors.transformers.parallel import adapted

        def make(prompt: Prompt, _: Sequence[int]) -> Made:
            self._encode(prompt)
            context = range(prompt.head, len(prompt.asked.ids))
            attention = functools.partial(adapted, prompt.model.causal, context, temperature, scale)
            return Made(self._kv, 0.0, self._start, attention)

        return make

    def _encode(self, prompt: Prompt) -> None:
        from kvstrata.connectors.transformers.parallel import encode_apart

        if self._prompt is prompt:
            return
        ids = prompt.asked.ids
        documents = [[ids[place] for place in places] for places in prompt.reused]
        encoded = encode_apart(prompt.model.causal, ids[: prompt.head], documents)
        self._prompt, self._start = prompt, encoded.start
        self._kv = _words(prompt.model, encoded.layers)


def sparse(ratio: float) -> Callable[[Prompt, Sequence[int]], Made]:
    """Each question answered from so many of the documents' tokens."""

    def make(prompt: Prompt, question: Sequence[int]) -> Made:
        from kvstrata.connectors.transformers.sparse import kept_tokens, looked_at

        model, documents = prompt.model, prompt.reused
        weights = looked_at(
            model.causal, _layers(model, prompt.loaded), prompt.head, documents, question
        )
        kept = kept_tokens(weights, prompt.head, documents, ratio)
        places = [*range(prompt.head), *kept]
        ids = [prompt.asked.ids[place] for place in places]
        chosen = range(prompt.head, len(places))
        kv = recompute(model, prompt.loaded[:, :, :, places], ids, chosen, places)
        return Made(kv, len(kept) / prompt.num_reused, len(prompt.asked.ids))

    return make


class _Donor:
    """Another model's KV, computed once for a prompt."""

    def __init__(self, donor: Model) -> None:
        self._donor = donor
        self._prompt: Prompt | None = None
        self._donations: dict[int, Any] = {}

    def way(self, share: float) -> Callable[[Prompt, Sequence[int]], Made]:
        """So many of the upper layers computed."""
        from kvstrata.connectors.transformers.donation import accept

        def make(prompt: Prompt, _: Sequence[int]) -> Made:
            self._donate(prompt)
            count = len(prompt.model.layer_types)
            taken = _taken(share, count)
            cache = accept(prompt.model.causal, self._donations[taken])
            kv = _words(prompt.model, [(layer.keys, layer.values) for layer in cache.layers])
            return Made(kv, 1 - taken / count)

        return make

    def _donate(self, prompt: Prompt) -> None:
        from kvstrata.connectors.transformers.donation import donate

        if self._prompt is prompt:
            return
        if self._donor.layer_types != prompt.model.layer_types:
            raise UsageError("the other model has other layers")
        counts = [_taken(share, len(self._donor.layer_types)) for share in COMPUTED_LAYERS]
        found = donate(self._donor.causal, prompt.asked.ids, *counts)
        self._prompt, self._donations = prompt, dict(zip(counts, found, strict=True))


def _taken(share: float, layers: int) -> int:
    """Layers that are taken over where that share is computed."""
    return layers - round(share * layers)


def _words(model: Model, layers: Sequence[tuple[Any, Any]]) -> Elements:
    """(L, 2, H, T, D), words of bfloat16, of keys and values (1, H, T, D)."""
    torch = model.torch
    states = torch.stack([torch.cat([keys, values]) for keys, values in layers])
    words: Elements = states.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
    return words


def _layers(model: Model, kv: Elements) -> list[tuple[Any, Any]]:
    """Keys and values (1, H, T, D) in float32, of words of bfloat16."""
    torch = model.torch
    states = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).to(model.device).float()
    return [(keys[None], values[None]) for keys, values in states]
