"""A fine-tune of a packaged model, small enough to be made here: for what reuses another's KV."""

from __future__ import annotations

from pathlib import Path

from kvstrata.quality.corpus import english_text
from kvstrata.testing.models.building import built, require
from kvstrata.testing.models.packaged import smollm2

STEPS, TOKENS, RATE = 24, 256, 1e-4


def smollm2_tuned(folder: Path | None = None) -> Path:
    """`smollm2` after some steps on the first half of `kvstrata.quality.corpus.english_text`.

    Its weights differ a little in every layer; how much depends on the machine's rounding.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (272 MB), complete. Blocks for minutes the first time, and takes 3 GB.
    Raises:
        UsageError: as `smollm2`.
    """
    torch, transformers = require("torch"), require("transformers")

    def fill(empty: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
        model = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        text = english_text()
        ids = tokenizer.encode(text[: len(text) // 2], add_special_tokens=False)
        stride = (len(ids) - TOKENS) // STEPS
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        model.train()
        for step in range(STEPS):
            piece = torch.tensor([ids[step * stride : step * stride + TOKENS]])
            model(piece, labels=piece).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().to(torch.bfloat16).save_pretrained(empty)
        tokenizer.save_pretrained(empty)

    return built("smollm2-135m-tuned", folder, fill)
