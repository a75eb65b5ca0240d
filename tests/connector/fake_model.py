"""A model that anybody can check: its KV and its tokens are digests of all tokens before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

from kvstrata.connectors.vllm.pages import Pages
from kvstrata.layout import LayerGroup, native_order

BLOCK, CHUNK, LAYERS, WORD = 16, 32, 2, 8
NAMES = tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))


class Memory:
    """The blocks of one rank: (L, blocks, tokens, 8 bytes), and what belongs into them."""

    def __init__(self, num_blocks: int, rank: int = 0) -> None:
        self.kv = np.zeros((LAYERS, num_blocks, BLOCK, WORD), np.uint8)
        self._rank = rank
        base, layer, block = self.kv.ctypes.data, self.kv.strides[0], self.kv.strides[1]
        self.pages = Pages(
            group=LayerGroup(
                index=0, kind="full", num_layers=LAYERS, num_kv_heads=1, head_dim=2, states=2,
                dtype="bfloat16",
            ),
            order=native_order(f"vllm/strided-NHC/b{BLOCK}/bfloat16"),
            layer_names=NAMES,
            block_tokens=BLOCK,
            page_bytes=block,
            num_blocks=num_blocks,
            bases=np.array([base + i * layer for i in range(LAYERS)], np.int64),
            strides=np.full(LAYERS, block, np.int64),
            device=torch.device("cpu"),
            compute_dtype=torch.bfloat16,
        )  # fmt: skip

    def words(self, digests: Sequence[bytes]) -> npt.NDArray[np.uint8]:
        """What the blocks must hold: (L, tokens, 8)."""
        plain = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, WORD)
        return np.stack([plain ^ np.uint8(i * 16 + self._rank + 1) for i in range(LAYERS)])


def digests(tokens: Sequence[int], salt: bytes = b"") -> list[bytes]:
    """What each token's KV is made of: all tokens up to it."""
    return _digests(tuple(tokens), salt)


@functools.lru_cache(maxsize=256)
def _digests(tokens: tuple[int, ...], salt: bytes) -> list[bytes]:
    state = blake2b(salt, digest_size=WORD)
    found = []
    for token in tokens:
        state.update(int(token).to_bytes(8, "little"))
        found.append(state.digest())
    return found


def sampled(tokens: Sequence[int]) -> int:
    """The token that the model answers after these."""
    return 100 + digests(tokens)[-1][0]
