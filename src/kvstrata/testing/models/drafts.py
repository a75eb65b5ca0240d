"""Tiny models that draft for their target out of its hidden states, and are right most of the time.

A random head guesses nothing, and then nobody sees whether its KV is there. So these compute what
their target computes, of all tokens but the first, as the next token's embedding is all that they
take: as good as their own KV of everything before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstrata.testing.models.building import built, require
from kvstrata.testing.models.tiny import Recipe, tiny_llama

LENGTH = 0.125
"""Root of the mean square of every embedding: a norm before the first layer is a factor then."""

GLM4 = Recipe(
    "Glm4Moe",
    {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_nextn_predict_layers": 0,
    },
)


def tiny_even_llama(folder: Path | None = None) -> Path:
    """`tiny_llama` with embeddings of equal length: the target of `tiny_eagle`."""

    def fill(empty: Path) -> None:
        shutil.copytree(tiny_llama(), empty, dirs_exist_ok=True)
        _rewrite(empty, _even)

    return built("tiny-even-llama", folder, fill)


def tiny_eagle(folder: Path | None = None) -> Path:
    """An EAGLE head of 3 layers for `tiny_even_llama`; embeddings and output are the target's.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (about 10 MB), complete.
    """

    def fill(empty: Path) -> None:
        target = tiny_even_llama()
        shutil.copy(target / "config.json", empty)
        weights = _load(target)
        # Of the token's embedding all, of the target's hidden state nothing.
        head = {"fc.weight": _first_half(weights["model.norm.weight"].numel())}
        for name, weight in weights.items():
            if name.startswith("model.layers.") and "layers.0.input_layernorm" not in name:
                # Its first layer has no norm of its own.
                normed = ".layers.0.self_attn." in name and "o_proj" not in name
                head[name.removeprefix("model.")] = weight / LENGTH if normed else weight
        _save(empty, head)

    return built("tiny-eagle", folder, fill)


def tiny_glm4_mtp(folder: Path | None = None) -> Path:
    """A GLM 4.5 of one layer with experts, and one more that predicts the token after the next.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (about 25 MB), complete.
    """

    def fill(empty: Path) -> None:
        GLM4.draw(empty, 0)
        config = json.loads((empty / "config.json").read_text())
        config["num_nextn_predict_layers"] = 1
        (empty / "config.json").write_text(json.dumps(config))
        _rewrite(empty, _with_mtp)

    return built("tiny-glm4-mtp", folder, fill)


def _with_mtp(weights: dict[str, Any]) -> None:
    torch = require("torch")
    _even(weights)
    norm = weights["model.norm.weight"]
    more = {
        "enorm.weight": torch.full_like(norm, LENGTH),
        "hnorm.weight": torch.ones_like(norm),
        "eh_proj.weight": _first_half(norm.numel()),
        "shared_head.norm.weight": norm.clone(),
    }
    of_first = "model.layers.0."
    for name, weight in weights.items():
        if name.startswith(of_first):
            more[name.removeprefix(of_first)] = weight.clone()
    weights |= {f"model.layers.1.{name}": weight for name, weight in more.items()}


def _even(weights: dict[str, Any]) -> None:
    torch = require("torch")
    embeddings = weights["model.embed_tokens.weight"].float()
    lengths = embeddings.pow(2).mean(1, keepdim=True).sqrt()
    weights["model.embed_tokens.weight"] = (embeddings / lengths * LENGTH).to(torch.bfloat16)


def _first_half(size: int) -> Any:
    """(size, 2 size), which keeps the first half of what it is multiplied with."""
    torch = require("torch")
    return torch.eye(size, 2 * size, dtype=torch.bfloat16)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = _load(folder)
    change(weights)
    _save(folder, weights)


def _load(folder: Path) -> dict[str, Any]:
    load_file = require("safetensors.torch").load_file
    loaded: dict[str, Any] = load_file(folder / "model.safetensors")
    return loaded


def _save(folder: Path, weights: dict[str, Any]) -> None:
    save_file = require("safetensors.torch").save_file
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
