"""Another fine-tune's lower layers: their KV is taken over, the upper layers are computed.

What enters the first computed layer is the other model's, too, so it is stored beside its KV.
Fine-tunes of one model differ more in some layers than in others; how many may be taken over is to
be measured on the pair.

Source: DroidSpeak, arXiv:2411.02820; differs: one group of layers at the top, not those that a
profile found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from kvstrata.connectors.transformers.kinds import new_cache
from kvstrata.errors import Incompatible


@dataclass(frozen=True)
class Donation:
    """What a model computed of a prompt, as far as another one takes it over.

    Args:
        layers: the lowest ones' keys and values (1, H, T, D).
        hidden: (1, T, hidden size), what enters the layer above them.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor


@torch.no_grad()
def donate(model: Any, ids: Sequence[int], *layers: int) -> list[Donation]:
    """Compute a prompt once, and keep what is below some layer.

    Args:
        model: of transformers.
        ids: of the prompt.
        layers: how many are to be taken over, each for a donation of its own; none to all.
    Raises:
        Incompatible: the model has not so many layers.
    """
    _check(model, *layers)
    cache = new_cache(model)
    found = model.base_model(
        torch.tensor([list(ids)], device=model.device),
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    states = [(layer.keys, layer.values) for layer in cache.layers]
    return [Donation(states[:below], found.hidden_states[below]) for below in layers]


@torch.no_grad()
def accept(model: Any, donation: Donation) -> DynamicCache:
    """The prompt's cache with the upper layers computed by this model.

    Args:
        model: of the same architecture as the one that donated.
        donation: of the prompt.
    Raises:
        Incompatible: it is of another shape, or its layers cannot be run one by one.
    """
    base = model.base_model
    layers = len(donation.layers)
    _check(model, layers)
    hidden = donation.hidden.to(model.device)
    if hidden.shape[-1] != model.config.get_text_config(decoder=True).hidden_size:
        raise Incompatible("the donation is of a model of another size")
    cache = new_cache(model)
    for number, (keys, values) in enumerate(donation.layers):
        cache.update(keys.to(model.device), values.to(model.device), number)
    position = torch.arange(hidden.shape[1], device=model.device)[None]
    mask = create_causal_mask(
        config=base.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=position,
    )
    turns = base.rotary_emb(hidden, position_ids=position)
    for layer in base.layers[layers:]:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=turns,
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return cache


def _check(model: Any, *layers: int) -> None:
    base = model.base_model
    if not hasattr(base, "layers") or not hasattr(base, "rotary_emb"):
        raise Incompatible(f"the layers of {type(base).__name__} cannot be run one by one")
    for count in layers:
        if not 0 <= count <= len(base.layers):
            raise Incompatible(f"{count} layers of {len(base.layers)}")
