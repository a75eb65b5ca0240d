"""Answers are what the model alone gives, over several turns, whatever came from the node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.plain import Texts
from tests.transformers.place import CHUNK, Place, greedy, load, whole
from transformers import TextStreamer, pipeline

from kvstrata.testing.workplace import wait_ready

# In float32, where cutting a prompt otherwise turns no token; windows of 300 and 200 tokens, pieces
# of 384.
MODELS = ("tiny_llama", "tiny_qwen3", "tiny_gemma3", "tiny_gpt_oss", "tiny_llama4")
NEW = 24


@pytest.mark.parametrize("name", MODELS)
def test_turns_of_a_chat(name: str, place: Place, texts: Texts) -> None:
    plain, model = load(name), load(name)
    first, *more = texts.of(410, 60, 150)
    turns = [first]
    for text in more:
        turns.append(greedy(plain, turns[-1], NEW) + text)
    cold = [greedy(plain, turn, NEW) for turn in turns]
    attached, known = place.attach(model), 0
    for turn, answer in zip(turns, cold, strict=True):
        assert greedy(model, turn, NEW) == answer
        assert attached.last.loaded_tokens == known
        assert attached.flush()
        # The last new token was not computed; what was said of the others is stored, too.
        known = whole(len(answer) - 1)
    for turn, answer in zip(turns, cold, strict=True):
        assert greedy(model, turn, NEW) == answer
        assert attached.last.loaded_tokens == min(whole(len(turn) - 1), known)
    counts = attached.stats()
    assert counts["stored_chunks"] == known // CHUNK
    assert not counts["errors"]
    assert not counts["bypassed"]


def test_a_real_model_in_bfloat16(place: Place, texts: Texts) -> None:
    """Of SmolLM2, compared with its own answers at the same cut of the prompt."""
    (prompt,) = texts.of(300)
    model = load("smollm2", "bfloat16")
    cold = greedy(model, prompt, 4)
    with torch.no_grad():
        past = model(torch.tensor([prompt[:256]]), use_cache=True).past_key_values
    cut = greedy(model, prompt, 4, past_key_values=past)
    attached = place.attach(model)
    assert greedy(model, prompt, 4) == cold
    assert attached.flush()
    assert greedy(model, prompt, 4) == cut
    assert attached.last.loaded_tokens == 256


def test_the_last_token_is_always_computed(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(2 * CHUNK)
    model = load("tiny_gemma3")
    cold = greedy(model, prompt, 5)
    attached = place.attach(model)
    greedy(model, prompt, 5)
    assert attached.flush()
    assert greedy(model, prompt, 5) == cold
    assert attached.last.loaded_tokens == CHUNK
    assert greedy(model, [*prompt, 7], 5)[: len(prompt)] == prompt
    assert attached.last.loaded_tokens == 2 * CHUNK
    # Shorter than a chunk: nothing to ask for.
    greedy(model, prompt[:20], 1)
    assert attached.last.loaded_tokens == 0


def test_sampled_and_scored_alike(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(400)
    model = load("tiny_llama")
    ids, options = torch.tensor([prompt]), {"max_new_tokens": 8, "return_dict_in_generate": True,
                                            "output_scores": True, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(5)
    cold = model.generate(ids, do_sample=True, **options)
    attached = place.attach(model)
    for loaded in (0, 384):
        torch.manual_seed(5)
        found = model.generate(ids, do_sample=True, **options)
        assert attached.last.loaded_tokens == loaded
        assert found.sequences.tolist() == cold.sequences.tolist()
        for ours, theirs in zip(found.scores, cold.scores, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert attached.flush()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma3"])
def test_the_cache_that_is_handed_out_is_the_models_own(
    name: str, place: Place, texts: Texts
) -> None:
    (prompt,) = texts.of(400)
    plain, model = load(name), load(name)
    ids, options = torch.tensor([prompt]), {"max_new_tokens": 3, "do_sample": False,
                                            "return_dict_in_generate": True}  # fmt: skip
    theirs = plain.generate(ids, **options).past_key_values
    attached = place.attach(model)
    for loaded in (0, 384):
        found = model.generate(ids, **options)
        assert attached.last.loaded_tokens == loaded
        assert found.past_key_values.get_seq_length() == theirs.get_seq_length()
        for one, other in zip(found.past_key_values.layers, theirs.layers, strict=True):
            assert one.keys.shape == other.keys.shape
            torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
            # It is the caller's now: what he does to it is not stored.
            one.keys.zero_()
        assert attached.flush()
    assert greedy(model, prompt, 3) == greedy(plain, prompt, 3)
    assert attached.last.loaded_tokens == 384


def test_streamers_pipelines_and_inference_mode(
    place: Place, texts: Texts, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompt,) = texts.of(300)
    model = load("tiny_llama")
    cold = greedy(model, prompt, 4)
    attached = place.attach(model)
    with torch.inference_mode():
        assert greedy(model, prompt, 4) == cold
    assert attached.flush()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    assert greedy(model, prompt, 4, streamer=streamer) == cold
    assert attached.last.loaded_tokens == 256
    assert capsys.readouterr().out.strip() == tokenizer.decode(cold[300:]).strip()
    asked = pipeline("text-generation", model=model, tokenizer=tokenizer)
    asked(tokenizer.decode(prompt), max_new_tokens=4, do_sample=False)
    assert attached.last.prompt_tokens >= 256
    assert not attached.stats()["errors"]


def test_from_disk_after_a_restart(own: Place, texts: Texts) -> None:
    own.stop_node()
    own.use_disk()
    own.start_node()
    (prompt,) = texts.of(700)
    model = load("tiny_gemma3")
    cold = greedy(model, prompt, NEW)
    attached = own.attach(model)
    assert greedy(model, prompt, NEW) == cold
    assert attached.flush()
    own.node.flush()
    own.detach()
    own.stop_node()
    own.start_node()
    wait_ready(own.node)  # it knows what is on the disk
    attached = own.attach(model)
    assert greedy(model, prompt, NEW) == cold
    assert attached.last.loaded_tokens == 640
    record = own.node.status()["requests"][-1]
    assert record["tier_tokens"] == {"disk": 640}
    assert record["loaded_tokens"] == 640
    own.check()


CHILD = """
import json, sys
from tests.transformers.place import greedy, load
from kvstrata.connectors.transformers import attach
settings, prompt = json.load(sys.stdin)
model = load("tiny_gemma3")
with attach(model, **settings) as attached:
    answer = greedy(model, prompt, 24)
    print(json.dumps([answer, attached.last.loaded_tokens]))
"""


def test_another_process_hits(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(500)
    model = load("tiny_gemma3")
    attached = place.attach(model)
    answer = greedy(model, prompt, 24)
    assert attached.flush()
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([place.settings, prompt]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout.splitlines()[-1]) == [answer, 384]
