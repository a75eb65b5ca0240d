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

from kvstrata.blend import BY_DEVIATION, Rule, choose
from kvstrata.blend.anchors import anchor_weights, sketch
from kvstrata.blend.segments import USUAL_RATIO
from kvstrata.codecs.elements import from_float32, to_float32
from kvstrata.layout import Elements
from kvstrata.quality.blending.prompts import Order, Prompt
from kvstrata.quality.blending.rows import recompute
from kvstrata.quality.models import DTYPE

RATIOS = (0.05, 0.15, 0.30, 0.50)
BOUNDS = (0.5, 0.3, 0.1)
"""Of the deviation of all reused tokens, how much those may have that are left as they are."""
SHARE_RATIO = 0.50
"""Of the tokens no more can be a standard deviation above their mean."""


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
        plan, ratio, bound: what it is called.
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
    bound: float | None = None

    @property
    def rule(self) -> Rule:
        """What it is called."""
        return Rule(self.plan, self.ratio, self.bound)


def ways(ratios: Sequence[float] = RATIOS) -> list[Way]:
    """What is measured on every model, in the order of the table.

    Args:
        ratios: that plans are measured at, besides none and all of the tokens.
    """
    rules = [
        *(Rule(plan, ratio) for plan in ("random", "edges", "deviation") for ratio in ratios),
        *(Rule("deviation", 1.0, bound) for bound in BOUNDS),
        Rule("share", SHARE_RATIO),
    ]
    return [
        Way("unturned", 0.0, lambda prompt, _: Made(prompt.unturned, 0.0)),
        Way("none", 0.0, lambda prompt, _: Made(prompt.loaded, 0.0)),
        *map(_planned, rules),
        *(Way("anchors", ratio, _anchored(ratio)) for ratio in (0.0, USUAL_RATIO)),
        _planned(Rule("all", 1.0)),
    ]


def computed_anew(prompt: Prompt, chosen: Sequence[int]) -> Made:
    """The loaded documents with these positions computed anew."""
    kv = recompute(prompt.model, prompt.loaded, prompt.asked.ids, chosen)
    return Made(kv, len(chosen) / prompt.num_reused)


def _planned(rule: Rule) -> Way:
    """A plan of the engine's."""

    def make(prompt: Prompt, _: Sequence[int]) -> Made:
        deviation = prompt.deviation if rule.plan in BY_DEVIATION else None
        chosen = choose(*rule[:2], prompt.reused, deviation, prompt.seed, rule.bound)
        return computed_anew(prompt, chosen)

    return Way(rule.plan, rule.ratio, make, bound=rule.bound)


def _anchored(ratio: float) -> Callable[[Prompt, Sequence[int]], Made]:
    def make(prompt: Prompt, _: Sequence[int]) -> Made:
        chosen = choose("anchors", ratio, prompt.reused)
        kv = recompute(prompt.model, _mean(prompt), prompt.asked.ids, chosen)
        return Made(kv, len(chosen) / prompt.num_reused)

    return make


def _mean(prompt: Prompt) -> Elements:
    """Each document's KV between those that it had in the prompts that it was seen in."""
    orders = [prompt.stored, *prompt.observed]
    loads = [to_float32(kv, DTYPE) for kv in (prompt.loaded, *prompt.other_loads)]
    mean = loads[0].copy()
    for number in prompt.asked.documents:
        tokens = prompt.asked.places[number]
        place = slice(tokens.start, tokens.stop)
        here, *there = (_before(order, number) for order in (prompt.asked, *orders))
        mean[:, :, :, place] = sum(
            np.float32(weight) * load[:, :, :, place]
            for weight, load in zip(anchor_weights(here, there), loads, strict=True)
        )
    words = np.empty(mean.shape, np.uint16)
    from_float32(mean, DTYPE, words)
    return words


def _before(order: Order, number: int) -> bytes:
    """A sketch of what lies before a document in an order."""
    return sketch(order.ids[: order.places[number].start])
