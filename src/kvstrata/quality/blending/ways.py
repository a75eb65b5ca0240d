"""Every way of reusing documents that is measured, each from a prompt to a cache to answer from.

The engine's own plans are `kvstrata.blend.plans`, run by the model here as the engine runs them.
The others are here to be compared with; what needs attention of its own comes from whoever
measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from kvstrata.blend import choose
from kvstrata.blend.others import anchor_weights, high_deviation
from kvstrata.codecs.elements import Floats, from_float32, to_float32
from kvstrata.layout import Elements
from kvstrata.quality.blending.prompts import Order, Prompt
from kvstrata.quality.blending.rows import recompute
from kvstrata.quality.models import DTYPE

RATIOS = (0.05, 0.15, 0.30, 0.50)
SHARE_RATIO = 0.50

_NEAR_TOKENS = 64  # before a document, which say how like two prefixes are


@dataclass(frozen=True)
class Made:
    """A cache to answer from.

    Args:
        kv: (L, 2, H, T, D), words of bfloat16.
        computed: share of the reused tokens that was computed anew.
        start: position of the first token behind it; None: T.
        attention: what answers are computed under.
    """

    kv: Elements
    computed: float
    start: int | None = None
    attention: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Args:
        plan, ratio: what it is called.
        make: from a prompt, and the tokens that will follow it, to a cache.
        by_question: whether it makes another cache for other tokens that follow.
        own_gap: whether it reuses something else than documents in another order, so that its gap
            is its own at ratio 0.
    """

    plan: str
    ratio: float
    make: Callable[[Prompt, Sequence[int]], Made]
    by_question: bool = False
    own_gap: bool = False


def ways(ratios: Sequence[float] = RATIOS) -> list[Way]:
    """What is measured on every model, in the order of the table.

    Args:
        ratios: that plans are measured at, besides none and all of the tokens.
    """
    planned = [
        Way(plan, ratio, _planned(plan, ratio))
        for plan in ("random", "edges", "deviation")
        for ratio in ratios
    ]
    return [
        Way("unturned", 0.0, lambda prompt, _: Made(prompt.unturned, 0.0)),
        Way("none", 0.0, lambda prompt, _: Made(prompt.loaded, 0.0)),
        *planned,
        Way("share", SHARE_RATIO, _shared),
        Way("anchors", 0.0, lambda prompt, _: Made(_anchored(prompt), 0.0)),
        Way("all", 1.0, _planned("all", 1.0)),
    ]


def computed_anew(prompt: Prompt, chosen: Sequence[int]) -> Made:
    """The loaded documents with these positions computed anew."""
    kv = recompute(prompt.model, prompt.loaded, prompt.asked.ids, chosen)
    return Made(kv, len(chosen) / prompt.num_reused)


def _planned(plan: str, ratio: float) -> Callable[[Prompt, Sequence[int]], Made]:
    def make(prompt: Prompt, _: Sequence[int]) -> Made:
        deviation = prompt.deviation if plan == "deviation" else None
        return computed_anew(prompt, choose(plan, ratio, prompt.reused, deviation, prompt.seed))

    return make


def _shared(prompt: Prompt, _: Sequence[int]) -> Made:
    return computed_anew(prompt, high_deviation(SHARE_RATIO, prompt.reused, prompt.deviation))


def _anchored(prompt: Prompt) -> Elements:
    """Each document's KV between those that it had in the prompts that it was seen in."""
    orders = [prompt.stored, *prompt.observed]
    loads = [to_float32(kv, DTYPE) for kv in (prompt.loaded, *prompt.other_loads)]
    # Values of the first layer are of the token alone: an embedding that the cache has at hand.
    values = loads[0][0, 1]
    mixed = loads[0].copy()
    for number in prompt.asked.documents:
        tokens = prompt.asked.places[number]
        place = slice(tokens.start, tokens.stop)
        anchors = np.array([_before(prompt, order, number, values) for order in orders])
        weights = anchor_weights(_before(prompt, prompt.asked, number, values), anchors)
        mixed[:, :, :, place] = sum(
            np.float32(weight) * load[:, :, :, place]
            for weight, load in zip(weights, loads, strict=True)
        )
    words = np.empty(mixed.shape, np.uint16)
    from_float32(mixed, DTYPE, words)
    return words


def _before(prompt: Prompt, order: Order, number: int, values: Floats) -> Floats:
    """Mean of (H, T, D) over the tokens before a document in an order, as one row."""
    place = order.documents.index(number)
    tokens = range(prompt.head)
    if place:
        tokens = prompt.asked.places[order.documents[place - 1]]
    last = tokens[-_NEAR_TOKENS:]
    mean: Floats = values[:, last.start : last.stop].mean(axis=1).reshape(-1)
    return mean
