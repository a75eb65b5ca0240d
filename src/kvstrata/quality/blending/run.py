"""The whole measurement: windows outside, ways inside, so that each prompt is computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from kvstrata import __version__
from kvstrata.errors import Incompatible, UsageError
from kvstrata.identity import weights_identity
from kvstrata.quality.blending.prompts import prompts
from kvstrata.quality.blending.rows import Turning
from kvstrata.quality.blending.samples import Sample, Window
from kvstrata.quality.blending.scores import scored
from kvstrata.quality.blending.table import BlendTable
from kvstrata.quality.blending.ways import Way, ways
from kvstrata.quality.models import Model

DOCUMENTS = 5
DOCUMENT_TOKENS = 160
WINDOWS = 20


def measure(
    folder: Path,
    name: str,
    text: str,
    *,
    measured: Sequence[Way] | None = None,
    more: Callable[[Model], Sequence[Way]] = lambda model: (),
    documents: int = DOCUMENTS,
    length: int = DOCUMENT_TOKENS,
    count: int = WINDOWS,
    weights_cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> BlendTable:
    """Measure ways of reusing documents on a model.

    Args:
        folder: of the model, in the Hugging Face form.
        name: of the model, for people.
        text: real prose.
        measured: ways, ``none`` among them; None: all of `kvstrata.quality.blending.ways`.
        more: further ones of this very model.
        documents: in each window, at least two.
        length: tokens of each.
        count: windows.
        weights_cache: where hashes of weights are remembered.
        tell: hears what goes on.
    Raises:
        UsageError: the model cannot be measured, or the text is too short.
    """
    if documents < 2:
        raise UsageError("documents in another order are two at least")
    weights = weights_identity(folder, weights_cache)
    model = Model(folder)
    turning = Turning(model)
    windows = prompts(model, turning, text, documents, length, count)
    longest = max(len(prompt.asked.ids) + len(prompt.following) for prompt in windows)
    if longest > model.max_tokens:
        raise UsageError(f"{name} takes {model.max_tokens} tokens, not {longest}")
    chosen = [*(ways() if measured is None else measured), *more(model)]
    samples: list[list[Sample]] = [[] for _ in chosen]
    losses, found = [], []
    left_out: dict[str, str] = {}
    ids = np.array([prompt.asked.ids + prompt.following for prompt in windows], "<i8")
    while windows:
        began = time.monotonic()
        # Prompts keep what they computed: none is needed once it was measured.
        window = Window(windows.pop(0))
        losses.append(window.loss)
        found.append(window.found)
        for way, gathered in zip(chosen, samples, strict=True):
            try:
                if way.plan not in left_out:
                    gathered.append(window.sample(way))
            except (UsageError, Incompatible) as error:
                left_out[way.plan] = str(error)
        tell(f"window {len(found)} of {count}: {time.monotonic() - began:.0f} s")
    of = {
        way.rule: gathered
        for way, gathered in zip(chosen, samples, strict=True)
        if way.plan not in left_out
    }
    return BlendTable(
        kvstrata=__version__,
        model=name,
        weights=weights,
        layers=len(model.layer_types),
        text=xxhash.xxh3_128_hexdigest(ids.tobytes()),
        windows=count,
        documents=documents,
        document_tokens=length,
        perplexity=float(np.exp(np.mean(losses))),
        found=tuple(float(share) for share in np.mean(found, axis=0)),
        rows=scored(of, found, {way.plan for way in chosen if way.own_gap}),
        left_out=left_out,
    )
