"""A proof that what a model keeps of a token does not depend on what follows it.

Where prompts are looked at from both ends, as some models of images and of embeddings do, a chunk
is good for no other prompt. No configuration says so in one word, so it is tried.
"""

from __future__ import annotations

from typing import Any

import torch

from kvstrata.connectors.transformers.kinds import new_cache
from kvstrata.errors import Incompatible

NUM_TOKENS = 8
TOLERANCE = 0.02
"""Of the largest number that a layer keeps: far above rounding, and below what a token does."""

ONE_TOKEN = {
    "max_new_tokens": 1,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "return_dict_in_generate": False,
}


@torch.no_grad()
def prove_causal(model: Any) -> None:
    """Prove it by the model's own ``generate``, with two prompts that differ in their last token.

    Raises:
        Incompatible: it is not so, or the model does not generate one token.
    """
    try:
        one, other = (_kept(model, last) for last in (1, 2))
    except Exception as error:
        raise Incompatible(f"it does not generate one token: {error}") from error
    for number, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        for mine, its in zip(ours, theirs, strict=True):
            most = float(mine.float().abs().max())
            apart = float((mine.float() - its.float()).abs().max())
            if not apart <= TOLERANCE * most:
                raise Incompatible(
                    f"what its layer {number} keeps of a token depends on what follows the token"
                )


def _kept(model: Any, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer keeps of all tokens but the last."""
    cache = new_cache(model)
    cache.activate_past_recording()
    ids = torch.tensor([[*range(3, 2 + NUM_TOKENS), last]], device=model.device)
    ids %= model.config.get_text_config(decoder=True).vocab_size
    mask = torch.ones_like(ids)
    type(model).generate(model, ids, attention_mask=mask, past_key_values=cache, **ONE_TOKEN)
    end = NUM_TOKENS - 1
    return [(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in cache.layers]
