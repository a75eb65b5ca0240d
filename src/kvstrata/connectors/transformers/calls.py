"""Which calls of ``generate`` use the cache: one prompt of plain tokens, sampled one by one.

Everything else is left to the model, and its reason has a name that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kvstrata.connectors.transformers.attention import are_changed

OURS = ("input_ids", "attention_mask", "logits_to_keep")
"""What may be given beside options of the generation."""
NOT_THE_MODELS = ("tokenizer", "assistant_tokenizer", "trust_remote_code")
MODES = ("greedy_search", "sample")


class Call(NamedTuple):
    """A call that uses the cache.

    Args:
        tokens: of the prompt.
        keeps_cache: whether the caller is handed the cache that was used.
        names_cache: whether the kind of cache is named, which goes with no cache that is given.
    """

    tokens: list[int]
    keeps_cache: bool
    names_cache: bool

    def with_cache(self, arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
        """The named arguments of the same call with a cache."""
        unnamed = {"cache_implementation": None} if self.names_cache else {}
        return {**arguments, **unnamed, "past_key_values": cache}


def look_at(model: Any, arguments: Mapping[str, Any]) -> Call | str:
    """What a call asks for, or why it is left to the model alone.

    Args:
        model: that generates.
        arguments: of ``generate`` by name, its further ones among them.
    Raises:
        Exception: whatever the arguments make transformers raise, which it then raises again.
    """
    more = dict(arguments)
    ids, config = more.pop("inputs", None), more.pop("generation_config", None)
    if model.training:
        return "training mode"
    if are_changed(model):
        return "attention scores are changed"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast"
    if more.pop("custom_generate", None) is not None:
        return "custom generate"
    if more.pop("assistant_model", None) is not None:
        return "assistant model"
    if more.pop("negative_prompt_ids", None) is not None:
        return "negative prompt"
    if more.pop("synced_gpus", None):
        return "synced gpus"
    for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
                 "negative_prompt_attention_mask", *NOT_THE_MODELS):  # fmt: skip
        more.pop(name, None)
    options, rest = model._prepare_generation_config(config, **more)
    if why := _of_options(options):
        return why
    if rest.get("inputs_embeds") is not None:
        return "inputs_embeds"
    if rest.get("past_key_values") is not None:
        return "a cache of the caller's"
    for name, value in rest.items():
        if name not in OURS and value is not None:
            return f"argument {name}"
    ids = rest.get("input_ids") if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return "no token ids"
    if ids.shape[0] != 1:
        return "batch"
    tokens: list[int] = ids[0].tolist()
    if not tokens or _is_padded(tokens, rest.get("attention_mask"), ids, options):
        return "padding" if tokens else "no token ids"
    keeps_cache = bool(options.return_dict_in_generate)
    return Call(tokens, keeps_cache, options.cache_implementation is not None)


def _of_options(options: Any) -> str:
    """Why these options of a generation leave it to the model alone; "": they do not."""
    if options.cache_implementation not in (None, "dynamic"):
        return f"{options.cache_implementation} cache"
    if options.use_cache is False:
        return "use_cache is off"
    if options.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    mode = options.get_generation_mode()
    if mode not in MODES:
        return str(getattr(mode, "value", mode)).replace("_", " ")
    if (options.num_return_sequences or 1) > 1:
        return "several sequences"
    if options.guidance_scale not in (None, 1, 1.0):
        return "guidance"
    if options.token_healing:
        return "token healing"
    if options.output_attentions or options.output_hidden_states:
        return "attentions or hidden states asked for"
    return "is an assistant" if options.is_assistant else ""


def _is_padded(tokens: Sequence[int], mask: Any, ids: torch.Tensor, options: Any) -> bool:
    """Whether a token is not looked at; without a mask transformers takes pad tokens for such."""
    if mask is not None:
        return mask.shape != ids.shape or not bool((mask == 1).all())
    pad, end = options.pad_token_id, options.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return pad is not None and pad not in ends and pad in tokens
