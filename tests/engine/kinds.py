"""The models of each kind of layers, and how vLLM is started with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from kvstrata.testing.models import MODELS

NEW = 12
"""Tokens of an answer."""


@dataclass(frozen=True)
class Kind:
    """A model, and what is known of it.

    Args:
        name: in `MODELS`.
        num_groups: how many groups vLLM makes of its layers.
        options: of vLLM's ``LLM``.
        environment: of the engine's process.
        step: most tokens that it computes in a step where steps are to be small: one less than
            two blocks, so no step ends where a block does unless vLLM sees to it.
        steady: whether plain vLLM answers alike alone and in a batch.
        few_blocks: enough for one prompt of 1,280 tokens, too few for six at once.
        crowd: tokens of the shortest of these six; with their answers they need more blocks than
            without, whatever lies behind a window.
    """

    name: str
    num_groups: int
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    step: int = 255
    few_blocks: int = 32
    crowd: int = 260
    steady: bool = True

    @property
    def folder(self) -> Path:
        """The model's folder, made if need be."""
        return MODELS[self.name]()

    def engine(self, **more: Any) -> dict[str, Any]:
        """Options of `Place.engine`."""
        return {
            "max_model_len": 4096,
            "new_tokens": NEW,
            "environment": dict(self.environment),
            **self.options,
            **more,
        }


LOCAL = {"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"}

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("tiny_gemma3", num_groups=3),
        Kind("tiny_qwen3_next", num_groups=4),
        Kind("tiny_gpt_oss", num_groups=2),
        Kind("tiny_mistral", num_groups=1, few_blocks=14),
        Kind("tiny_llama4", num_groups=4, environment=LOCAL, crowd=390),
        # With longer steps vLLM wants a state from inside one, which its CPU kernel does not give.
        Kind(
            "tiny_granite4",
            num_groups=4,
            options={"max_num_batched_tokens": 128},
            step=128,
            few_blocks=22,
        ),
        Kind("tiny_lfm2", num_groups=4, steady=False),
        # Real weights; 15 layers with a window of 512 tokens, 3 of full attention.
        Kind("gemma3", num_groups=6, few_blocks=64),
    )
}
"""What vLLM runs on a CPU, by the model's name; docs/models.md has what it does not."""

ALWAYS = ("tiny_gemma3", "tiny_qwen3_next")
"""Windows, and recurrent states: what every run tests. The others have the mark ``more``."""

PARAMS = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.more, id=name) for name in KINDS
]
