"""What drafts for a model has its KV back with the target's, so it drafts as well warm as cold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.engine import CHUNK, Answer, Engine, Prompt, whole_chunks
from tests.engine.place import Place, eventually, known_tokens
from tests.engine.plain import Texts

from kvstrata.testing import models

pytestmark = pytest.mark.engine


def widened(model: Path, folder: Path) -> Path:
    """The same model with each KV head twice: its answers are equal, its KV is of another shape."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    heads, size = config["num_key_value_heads"], config["head_dim"]
    config["num_key_value_heads"] = 2 * heads
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            each = weight.unflatten(0, (heads, size))
            weights[name] = each.repeat_interleave(2, 0).flatten(0, 1).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Drafting(NamedTuple):
    """How a model is drafted for.

    Args:
        target: its folder.
        how: vLLM's ``speculative_config``, given a folder for what is made for it.
        layers: of each of the objects that make up a chunk.
        least: share of the drafts that are accepted, with all KV there.
    """

    target: Callable[[], Path]
    how: Callable[[Path], dict[str, Any]]
    layers: list[str]
    least: float


DRAFTINGS = {
    # It drafts for itself, so nearly all is right; the rest is rounding.
    "draft model": Drafting(
        models.tiny_llama,
        lambda _: {"method": "draft_model", "model": str(models.tiny_llama())},
        ["6"],
        0.9,
    ),
    "another shape": Drafting(
        models.tiny_llama,
        lambda folder: {
            "method": "draft_model",
            "model": str(widened(models.tiny_llama(), folder / "wide")),
        },
        ["3", "3"],
        0.9,
    ),
    "EAGLE": Drafting(
        models.tiny_even_llama,
        lambda _: {"method": "eagle", "model": str(models.tiny_eagle())},
        ["6"],
        0.2,
    ),
    "MTP": Drafting(models.tiny_glm4_mtp, lambda _: {"method": "mtp"}, ["2"], 0.5),
}


def accepted(engine: Engine, prompts: Sequence[Prompt]) -> tuple[list[Answer], float]:
    """Answers, and the share of the drafts that was right."""
    before = engine.call("drafts")
    answers = engine.answers(prompts)
    after = engine.call("drafts")
    drafted = after["draft"] - before["draft"]
    return answers, (after["accepted"] - before["accepted"]) / drafted


@pytest.mark.parametrize("name", DRAFTINGS)
def test_it_drafts_as_well_warm_as_cold(texts: Texts, tmp_path: Path, name: str) -> None:
    target, how, layers, least = DRAFTINGS[name]
    prompts = texts.of(300, 450)
    options: dict[str, Any] = {
        "speculative_config": {**how(tmp_path), "num_speculative_tokens": 3},
        "disable_log_stats": False, "max_model_len": 2048, "new_tokens": 24,
    }  # fmt: skip
    with Place(target()) as place:
        engine = place.engine(**options)
        cold, cold_rate = accepted(engine, prompts)
        stored = [known_tokens(*pair) for pair in zip(prompts, cold, strict=True)]
        objects = sum(len(tokens) // CHUNK for tokens in stored) * len(layers)
        eventually(lambda: place.count("stored_objects_total") >= objects, "all stored")
        local, local_rate = accepted(engine, prompts)
        engine.forget()
        warm, warm_rate = accepted(engine, prompts)
        assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
        assert [answer.tokens for answer in warm] == [answer.tokens for answer in local]
        assert warm_rate == local_rate
        assert min(cold_rate, warm_rate) > least, (cold_rate, warm_rate)
        (namespace,) = place.node.status()["namespaces"]
        assert re.findall(r"(\d+) layers", namespace["parts"]["layout"]) == layers
        place.check()
