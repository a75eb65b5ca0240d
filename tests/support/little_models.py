"""Models of a few thousand random weights, with byte pairs learnt from the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstrata.quality.corpus import english_text

VOCABULARY = 900


def byte_pairs() -> Any:
    """A tokenizer; nothing is downloaded. Skips where transformers is missing."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([english_text()[:40_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def little(kind: str, tokenizer: Any, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A folder with a causal model of that kind, wide enough that answers depend on the whole
    cache.

    Args:
        kind: as transformers names it: Llama.
        tokenizer: see `byte_pairs`.
        folder: an empty one.
        seed: of the weights.
        options: of the configuration, beside what all of them have.
    """
    import torch
    import transformers

    config = getattr(transformers, options.pop("config", f"{kind}Config"))(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "initializer_range": 0.3,
            "pad_token_id": None,
            **options,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
