"""Calls that are left to the model alone: the answer is its own, and the reason has a name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.plain import Texts
from tests.transformers.place import Place, load
from transformers import DynamicCache, GenerationConfig

from kvstrata.connectors.transformers.parallel import adapted

NEW = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return load("tiny_llama")


@functools.cache
def another() -> Any:
    return load("tiny_qwen3")


def options(**more: Any) -> Callable[[Any, torch.Tensor], dict[str, Any]]:
    return lambda model, ids: {"input_ids": ids, **more}


def padded(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def padded_without_a_mask(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    ids = ids.clone()
    ids[0, 0] = 9
    return {"input_ids": ids, "pad_token_id": 9, "eos_token_id": 8}


def embedded(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(ids).detach()}


LEFT_ALONE: dict[str, Callable[[Any, torch.Tensor], dict[str, Any]]] = {
    "batch": lambda model, ids: {"input_ids": torch.cat([ids, ids])},
    "beam search": options(num_beams=2),
    "several sequences": options(num_return_sequences=2, do_sample=True, top_k=1),
    "assistant model": lambda model, ids: {"input_ids": ids, "assistant_model": another()},
    "assisted generation": options(prompt_lookup_num_tokens=2),
    "static cache": options(cache_implementation="static"),
    "use_cache is off": options(use_cache=False),
    "a cache of the caller's": lambda model, ids: {
        "input_ids": ids,
        "past_key_values": DynamicCache(config=model.config),
    },
    "prefill_chunk_size": options(prefill_chunk_size=64),
    "inputs_embeds": embedded,
    "padding": padded,
    "padding ": padded_without_a_mask,
    "argument position_ids": lambda model, ids: {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1])[None],
    },
    "attentions or hidden states asked for": options(output_hidden_states=True),
    "guidance": options(guidance_scale=1.5),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_left_to_the_model(why: str, model: Any, place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(140)
    asked = {**NEW, **LEFT_ALONE[why](model, torch.tensor([prompt]))}

    def again() -> dict[str, Any]:
        """A cache is filled by the call it is given to."""
        fresh = LEFT_ALONE[why](model, torch.tensor([prompt]))
        return {**asked, **{name: fresh[name] for name in ("past_key_values",) if name in fresh}}

    cold = model.generate(**again())
    attached = place.attach(model)
    for _ in range(2):
        assert model.generate(**again()).tolist() == cold.tolist()
    assert attached.stats()["bypassed"] == {why.strip(): 2}
    assert attached.last.bypassed == why.strip()
    assert attached.stats()["prompt_tokens"] == attached.stats()["stored_chunks"] == 0
    assert "generate" in vars(model)


def test_training_mode(model: Any, place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(140)
    attached = place.attach(model)
    model.train()
    try:
        model.generate(torch.tensor([prompt]), **NEW)
    finally:
        model.eval()
    assert attached.stats()["bypassed"] == {"training mode": 1}


def test_autocast(model: Any, place: Place, texts: Texts) -> None:
    """It computes in another dtype than the model has, and so would what was loaded not be its."""
    (prompt,) = texts.of(140)
    ids = torch.tensor([prompt])
    with torch.autocast("cpu", torch.bfloat16):
        cold = model.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    attached = place.attach(model)
    model.generate(ids, **NEW)
    assert attached.flush()
    with torch.autocast("cpu", torch.bfloat16):
        warm = model.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    assert all(map(torch.equal, warm.logits, cold.logits))
    assert attached.stats()["bypassed"] == {"autocast": 1}


def test_changed_attention(model: Any, place: Place, texts: Texts) -> None:
    """What a model computes by changed scores is nobody else's, and it takes nothing of others."""
    (prompt,) = texts.of(300)
    ids = torch.tensor([prompt])
    cold = model.generate(ids, **NEW)
    with adapted(model, range(1, 290), 0.2, 0.2):
        apart = model.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    attached = place.attach(model)
    with adapted(model, range(1, 290), 0.2, 0.2):
        first = model.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    assert all(map(torch.equal, first.logits, apart.logits))
    assert attached.last.bypassed == "attention scores are changed"
    for loaded in (0, 256):
        assert model.generate(ids, **NEW).tolist() == cold.tolist()
        assert attached.last.loaded_tokens == loaded
        assert attached.flush()
    with adapted(model, range(1, 290), 0.2, 0.2):
        again = model.generate(ids, **NEW, output_logits=True, return_dict_in_generate=True)
    assert all(map(torch.equal, again.logits, apart.logits))
    assert attached.stats()["bypassed"] == {"attention scores are changed": 2}


def test_every_way_to_ask_is_understood(model: Any, place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(140)
    ids, config = torch.tensor([prompt]), GenerationConfig(**NEW)
    attached = place.attach(model)
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids,), NEW),
        ((ids, config), {}),
        ((), {"inputs": ids, **NEW}),
        ((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **NEW}),
        ((ids,), {"cache_implementation": "dynamic", **NEW}),
        ((ids, GenerationConfig(cache_implementation="dynamic", **NEW)), {}),
    ]
    answers = set()
    for args, kwargs in asked:
        answers.add(tuple(model.generate(*args, **kwargs)[0].tolist()))
        assert attached.flush()
    assert len(answers) == 1
    assert attached.stats()["loaded_tokens"] == 5 * 128
    assert not attached.stats()["bypassed"]


def test_what_transformers_refuses_it_refuses_itself(
    model: Any, place: Place, texts: Texts
) -> None:
    (prompt,) = texts.of(140)
    attached = place.attach(model)
    ids = torch.tensor([prompt])
    for wrong, error in (({"max_new_tokens": -1}, ValueError), ({"no_such_thing": 1}, ValueError)):
        with pytest.raises(error):
            model.generate(ids, **{**NEW, **wrong})
    with pytest.raises(TypeError):
        model.generate(ids, inputs=ids)
    assert not attached.stats()["errors"]
