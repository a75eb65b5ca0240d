"""That a model reads a cache of kept tokens as it is meant: tried before any call relies on it.

Where every head keeps everything, the next tokens must come out as from the exact cache. A model
whose attention has more to it than ours would show here, or is refused by its arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvstrata.connectors.transformers.kinds import Kinds, new_cache
from kvstrata.connectors.transformers.ragged import answering, cache_of
from kvstrata.errors import Incompatible
from kvstrata.layout import WORDS
from kvstrata.selection.kept import Kept

CONTEXT, NEW = 12, 4
TOLERANCE = 0.02
"""Of the largest logit: far above rounding, and below what another attention does."""


@torch.no_grad()
def prove_kept(model: Any, twin: Any, kinds: Kinds) -> None:
    """Compare a model on its exact cache with its twin on one that keeps everything.

    Raises:
        Incompatible: they differ, or the twin's attention refuses; in words.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 3 + CONTEXT + NEW, device=kinds.device)[None] % vocabulary
    cache = new_cache(model)
    try:
        model(input_ids=ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
        kept = cache_of(everything(cache, kinds), kinds.device)
        exact = model(input_ids=ids[:, CONTEXT:], past_key_values=cache, use_cache=True).logits
        with answering():
            ours = twin(input_ids=ids[:, CONTEXT:], past_key_values=kept, use_cache=True).logits
    except Incompatible:
        raise
    except Exception as error:
        raise Incompatible(f"it does not compute on a cache of kept tokens: {error}") from error
    most, apart = float(exact.abs().max()), float((exact - ours).abs().max())
    if not apart <= TOLERANCE * most:
        raise Incompatible(
            "its attention is not the plain one: on a cache that keeps everything it says "
            f"something else, by {apart / most:.2g} of its largest logit"
        )


def everything(cache: Any, kinds: Kinds) -> Kept:
    """An exact cache as kept tokens, all of them."""
    (kind,) = kinds.each
    group = kind.group
    tokens = int(cache.get_seq_length())
    word = WORDS[group.item_bytes]
    rows = []
    for state in ("keys", "values"):
        layers = [getattr(cache.layers[number], state)[0] for number in kind.layers]
        flat = torch.cat([layer.reshape(-1, group.head_dim) for layer in layers]).cpu()
        words = flat.contiguous().view(torch.uint8).numpy().view(word)
        rows.append(words.reshape(-1, group.head_dim))
    counts = np.full((group.num_layers, group.num_kv_heads), tokens, np.int32)
    positions = np.tile(np.arange(tokens, dtype=np.int32), counts.size)
    return Kept(counts, positions, rows[0], rows[1], group.dtype, tokens)
