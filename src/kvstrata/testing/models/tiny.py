"""Tiny models with random weights: one for each kind of layers that an engine keeps apart.

Each has a few layers, SmolLM2's tokenizer, bfloat16 weights and 8,192 positions. The weights are
drawn wide, and recurrent states forget slowly, so that answers depend on the whole prompt and a
wrong byte of what is cached shows. Windows are no whole number of chunks, so their edge lies
inside one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstrata.testing.models.building import built, require
from kvstrata.testing.models.packaged import smollm2

SMALL: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.17,
    "tie_word_embeddings": False,
}
"""What most of them have alike: 256 bytes of KV a token and attention layer."""


@dataclass(frozen=True)
class Recipe:
    """What a tiny model is drawn from.

    Args:
        kind: prefix of the classes ``<kind>Config`` and ``<kind>ForCausalLM`` of transformers.
        options: of the configuration, on top of `SMALL`.
        config: the configuration's class where it has another name.
        without: options of `SMALL` that this configuration does not know.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    without: tuple[str, ...] = ()

    def draw(self, empty: Path, seed: int) -> None:
        """Save the model and its tokenizer into a folder."""
        transformers, torch = require("transformers"), require("torch")
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
        small = {name: value for name, value in SMALL.items() if name not in self.without}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = getattr(transformers, self.config or f"{self.kind}Config")(
            vocab_size=len(tokenizer), pad_token_id=None, **ends, **{**small, **self.options}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, f"{self.kind}ForCausalLM")(config)
            _sharpen(model)
        model.to(torch.bfloat16).save_pretrained(empty)
        tokenizer.save_pretrained(empty)


def _sharpen(model: Any) -> None:
    """Let states decay over some tens to thousands of tokens, and attention look at few of them."""
    torch = require("torch")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("A_log"):
                weights.uniform_(math.log(0.02), math.log(0.5))
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                weights.uniform_(-4.0, -2.0)
            elif name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                weights.fill_(2.0)


def tiny_llama(folder: Path | None = None, seed: int = 0) -> Path:
    """A Llama of random bfloat16 weights that two tensor-parallel ranks can share.

    3 layers, 4 heads, 2 KV heads, head_dim 64, 8,192 positions; SmolLM2's tokenizer.

    Args:
        folder: where to put it; in the cache if None.
        seed: decides the weights: two seeds are two fine-tunes of one architecture.
    Returns:
        The folder (about 50 MB), complete.
    Raises:
        UsageError: SmolLM2 (for its tokenizer) or transformers is missing.
    """
    recipe = Recipe(
        "Llama",
        {
            "num_hidden_layers": 3,
            "hidden_size": 256,
            "intermediate_size": 512,
            "head_dim": 64,
            "initializer_range": 0.12,
        },
    )
    return built(f"tiny-llama-seed{seed}", folder, lambda empty: recipe.draw(empty, seed))


RECIPES: Mapping[str, Recipe] = {
    # 4 layers with a window of 300 tokens and 2 of full attention: two groups and one.
    "tiny_gemma3": Recipe(
        "Gemma3",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 300,
            "query_pre_attn_scalar": 32,
        },
        config="Gemma3TextConfig",
    ),
    # Full attention whose queries and keys are normalised.
    "tiny_qwen3": Recipe("Qwen3", {"num_hidden_layers": 3}),
    # Full attention; positions stretched to four times as many, and keys lengthened for it.
    "tiny_yarn": Recipe(
        "Llama",
        {
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
        },
    ),
    # Full attention; half of a head turns, and neighbours in it are a pair.
    "tiny_glm4": Recipe("Glm4", {"num_hidden_layers": 3, "partial_rotary_factor": 0.5}),
    # Windows and full attention in turn, a learnt sink in each head, and experts.
    "tiny_gpt_oss": Recipe(
        "GptOss",
        {
            "num_hidden_layers": 4,
            "sliding_window": 200,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    # Nothing but windows.
    "tiny_mistral": Recipe("Mistral", {"num_hidden_layers": 3, "sliding_window": 300}),
    # 3 layers that attend within pieces of 384 tokens, and 1 of full attention.
    "tiny_llama4": Recipe(
        "Llama4",
        {
            "num_hidden_layers": 4,
            "attention_chunk_size": 384,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 0,
            "moe_layers": [],
            "attn_temperature_tuning": False,
        },
        config="Llama4TextConfig",
    ),
    # Multi-head latent attention: 576 numbers a token and layer, whatever the heads. The sizes
    # are DeepSeek's own, since the CPU's kernels know no others.
    "tiny_deepseek": Recipe(
        "DeepseekV2",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
        },
        without=("head_dim",),
    ),
    # 3 layers of a gated delta net and 1 of full attention.
    "tiny_qwen3_next": Recipe(
        "Qwen3Next",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            # vLLM wants experts in one layer at least.
            "mlp_only_layers": [0, 1, 2],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    # 3 Mamba-2 layers and 1 of full attention: Granite 4.
    "tiny_granite4": Recipe(
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "attention_multiplier": 0.18,
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
        },
        without=("head_dim",),
    ),
    # 3 short convolutions and 1 layer of full attention.
    "tiny_lfm2": Recipe(
        "Lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "block_dim": 128,
            "conv_dim": 128,
        },
        without=("head_dim",),
    ),
    # 3 Mamba-1 layers and 1 of full attention.
    "tiny_jamba": Recipe(
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 3,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
        without=("head_dim",),
    ),
    # No attention at all.
    "tiny_mamba": Recipe(
        "Mamba",
        {"num_hidden_layers": 3, "hidden_size": 128, "tie_word_embeddings": False},
        without=(
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
    ),
}
"""The tiny models besides `tiny_llama`, by name."""


def tiny(name: str, folder: Path | None = None, seed: int = 0) -> Path:
    """One of `RECIPES`.

    Args:
        name: of the recipe.
        folder: where to put it; in the cache if None.
        seed: decides the weights.
    Returns:
        The folder (about 25 MB), complete.
    Raises:
        UsageError: SmolLM2 (for its tokenizer) or transformers is missing.
    """
    recipe = RECIPES[name]
    called = f"{name.replace('_', '-')}-seed{seed}"
    return built(called, folder, lambda empty: recipe.draw(empty, seed))


TINY: Mapping[str, Callable[[], Path]] = {
    "tiny_llama": tiny_llama,
    **{name: functools.partial(tiny, name) for name in RECIPES},
}
"""Every tiny model by its name."""
