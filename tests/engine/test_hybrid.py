"""Hybrid models of real weights; what must not be shared: adapters, embeddings, other weights."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import CHUNK, NEW_TOKENS, request, whole_chunks
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines, Shared

from kvstrata.testing import models

pytestmark = pytest.mark.engine


@pytest.mark.dear
def test_windows_beside_full_attention(gemma3: Path, engines: Engines) -> None:
    """Gemma 3's windows reach back four chunks, its full attention to the beginning."""
    from transformers import AutoTokenizer

    prompts = Texts(AutoTokenizer.from_pretrained(gemma3), "gemma").of(100, 700, 1100)
    cached = [whole_chunks(len(prompt)) for prompt in prompts]
    with Place(gemma3) as place:
        options: dict[str, Any] = {"max_model_len": 2048, "new_tokens": 8}
        plain = engines.plain(gemma3, **options)
        engine = place.engine(**options)
        about = plain.engine.wait(), engine.wait()
        for one in about:
            assert one["hybrid_off"] is False
            assert one["num_groups"] > 1
        assert about[0] == about[1]
        cold = engine.answers(prompts)
        assert {answer.cached for answer in cold} == {0}
        assert [answer.tokens for answer in cold] == plain.cold(prompts)

        def hits() -> bool:
            engine.forget()
            answers = engine.answers([request(prompt, 1) for prompt in prompts])
            return [answer.cached for answer in answers] == cached

        eventually(hits, f"hits of {cached} tokens")
        engine.forget()
        warm = engine.answers(prompts)
        assert [answer.cached for answer in warm] == cached
        assert [answer.tokens for answer in warm] == plain.warm(prompts)
        place.check()


@pytest.mark.more
def test_latents_by_reference_kernels_are_left_alone(engines: Engines, texts: Texts) -> None:
    """vLLM decodes a token otherwise with them than it computes it at a prompt's end."""
    options: dict[str, Any] = {
        "attention_config": {"backend": "CPU_MLA"},
        "max_model_len": 1024,
        "new_tokens": 8,
    }
    folder, prompts = models.TINY["tiny_deepseek"](), texts.of(300, 700)
    with Place(folder) as place:
        plain, engine = engines.plain(folder, **options), place.engine(**options)
        for _ in range(2):
            answers = engine.answers(prompts)
            assert {answer.cached for answer in answers} == {0}
            assert [answer.tokens for answer in answers] == plain.cold(prompts)
        assert "KVStrata leaves this engine's KV uncached" in engine.log


def adapter(folder: Path, seed: int, *, queries: bool = False) -> Path:
    """A LoRA adapter for the tiny Llama with random weights that change every answer.

    Args:
        queries: change these, too, not only keys and values.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    rank, hidden, sizes = 8, 256, {"k_proj": 128, "v_proj": 128}
    if queries:
        sizes["q_proj"] = 256
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(sizes),
        "base_model_name_or_path": "tiny", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(3):
        for module, size in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (rank, hidden)), ("lora_B", (size, rank))):
                random = torch.randn(shape, generator=generator) * 0.05
                weights[f"{name}.{part}.weight"] = random.to(torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_adapters_never_share(shared: Shared, texts: Texts, tmp_path: Path) -> None:
    """Two adapters and the base share no hit; a copy of an adapter elsewhere does share."""
    first, second = adapter(tmp_path / "a" / "lora", 1), adapter(tmp_path / "b" / "lora", 2)
    copy = tmp_path / "c" / "lora"
    shutil.copytree(first, copy)
    prompts = texts.of(200, 300, 500, 700)
    place = shared.place
    options: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 1,
        "max_model_len": 2048,
    }
    with closing(place.engine(**options)) as engine:
        engine.wait()
        cold: dict[str, Any] = {}
        for lora in ("", str(first), str(second)):
            stored = place.count("stored_objects_total")
            asked = [request(prompt, lora=lora) for prompt in prompts]
            answers = engine.answers(asked)
            assert {answer.cached for answer in answers} == {0}, lora
            cold[lora] = answers
            num_chunks = sum((len(prompt) + 31) // CHUNK for prompt in prompts)
            eventually(
                lambda before=stored, more=num_chunks: (  # type: ignore[misc]
                    place.count("stored_objects_total") >= before + more
                ),
                "an adapter's chunks stored",
            )
            # vLLM's own hit upon the same adapter: the reference for the warm answer.
            cold[lora + "warm"] = engine.answers(asked)
            engine.forget()
        assert cold[""] != cold[str(first)] != cold[str(second)]
        for lora in (str(second), str(first), "", str(copy)):
            engine.forget()
            warm = engine.answers([request(prompt, lora=lora) for prompt in prompts])
            known = str(first) if lora == str(copy) else lora
            assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
            assert [a.tokens for a in warm] == [a.tokens for a in cold[known + "warm"]]
    place.check()


def test_prompt_embeddings_are_left_alone(shared: Shared, plain: Plain, texts: Texts) -> None:
    """They have no token ids to be found by; requests with tokens beside them hit as ever."""
    prompts = texts.of(200, 300, 500)
    place = shared.place
    with closing(place.engine(enable_prompt_embeds=True)) as engine:
        engine.answers(prompts)
        place.await_stored(engine, prompts)
        matches = place.count("matches_total")
        engine.forget()
        embedded = engine.answers([request(prompt, embeds=True) for prompt in prompts])
        assert {answer.cached for answer in embedded} == {0}
        assert [answer.tokens for answer in embedded] == plain.cold(prompts)
        assert place.count("matches_total") == matches
        record = place.last_record(len(prompts[-1]) + NEW_TOKENS)
        assert [(one["why"], one["tokens"]) for one in record["reasons"]] == [
            ("bypassed", whole_chunks(len(prompts[-1]))),
            ("not a whole chunk", len(prompts[-1]) % CHUNK),
        ]
        engine.forget()
        both = [request(prompt, embeds=embeds) for prompt in prompts for embeds in (True, False)]
        answers = engine.answers(both)
        assert [answer.tokens for answer in answers[1::2]] == plain.warm(prompts)
    place.check()


def test_other_weights_in_a_folder_of_the_same_name(
    tiny_llama: Path, texts: Texts, tmp_path: Path
) -> None:
    """A fine-tune in the very folder shares nothing; the old weights elsewhere share all."""
    folder, elsewhere = tmp_path / "one" / "model", tmp_path / "two" / "model"
    prompts = texts.of(150, 300, 600)
    with Place(folder) as place:
        shutil.copytree(tiny_llama, folder)
        first = place.engine()
        old = first.answers(prompts)
        place.await_stored(first, prompts)
        first.close()
        shutil.rmtree(folder)
        other = models.tiny_llama(tmp_path / "other", seed=1)
        shutil.move(other, folder)
        new = place.engine().answers(prompts)
        assert {answer.cached for answer in new} == {0}
        assert all(one.tokens != two.tokens for one, two in zip(old, new, strict=True))
        shutil.copytree(tiny_llama, elsewhere)
        warm = place.engine(model=elsewhere).answers(prompts)
        assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
        assert [a.tokens[0] for a in warm] == [a.tokens[0] for a in old]
        place.check()
