"""A model that anybody can check: its KV and its tokens are digests of all tokens before.

Its layer groups share one memory, as vLLM's do: a block belongs to one group at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvstrata.connectors.vllm.groups import Group
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.layout import LayerGroup, NativeOrder, native_order

BLOCK, CHUNK, LAYERS, WORD = 16, 32, 2, 8
NAMES = tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))
PAGE = BLOCK * WORD
DRAFT = "draft.layers.0.self_attn"
"""A layer with twice the heads of the others, in the block table of one of their groups."""
STATE = 12 * WORD
"""Bytes of a state: the end of its page is never read."""

_ATTENTION: dict[str, Any] = {
    "block_size": BLOCK, "num_kv_heads": 1, "head_size": 2, "dtype": torch.bfloat16,
}  # fmt: skip
SPECS: dict[str, Any] = {
    "full": FullAttentionSpec(**_ATTENTION),
    "latent": MLAAttentionSpec(**{**_ATTENTION, "head_size": 4}),
    "window": SlidingWindowSpec(**_ATTENTION, sliding_window=40),
    "long window": SlidingWindowSpec(**_ATTENTION, sliding_window=97),
    "piece": ChunkedLocalAttentionSpec(**_ATTENTION, attention_chunk_size=64),
    "state": MambaSpec(
        block_size=BLOCK,
        shapes=((16,), (16,)),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=PAGE,
        mamba_cache_mode="align",
    ),
}
"""Of the kinds of layer groups."""


def kv_cache_config(
    num_blocks: int, kinds: Sequence[str] = ("full",), draft: int | None = None
) -> KVCacheConfig:
    """vLLM's groups, one of each of these kinds; `DRAFT` in the one of that number."""
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec([f"{name}.{i}" if i else name for name in NAMES], SPECS[kind])
            for i, kind in enumerate(kinds)
        ],
        prefix_cache_retention_interval=0,  # vLLM's default
    )
    if draft is not None:
        group = config.kv_cache_groups[draft]
        shapes = dict.fromkeys(group.layer_names, group.kv_cache_spec)
        shapes[DRAFT] = dataclasses.replace(group.kv_cache_spec, num_kv_heads=2)
        group.layer_names.append(DRAFT)
        group.kv_cache_spec = UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs=shapes)
    return config


def heads_of(rank: int, ranks: int, heads: int) -> range:
    """The KV heads that vLLM gives to a rank: neighbours, or one that other ranks have, too."""
    first, end = rank * heads // ranks, (rank + 1) * heads // ranks
    return range(first, max(end, first + 1))


class Memory:
    """The blocks of one rank, and what belongs into them.

    ``kv`` is (L, blocks, tokens, 8 bytes); of several heads (L, blocks, tokens, H, 8 bytes), and
    in memory a block keeps head after head. Those of `DRAFT` are (1, blocks, tokens, 16 bytes),
    with the numbers of a rank that has one head.
    """

    def __init__(self, num_blocks: int, heads: range = range(1)) -> None:
        blocks = np.zeros((LAYERS, num_blocks, len(heads), BLOCK, WORD), np.uint8)
        self.kv = blocks[:, :, 0] if len(heads) == 1 else blocks.swapaxes(2, 3)
        self.draft = np.zeros((1, num_blocks, BLOCK, 2 * WORD), np.uint8)
        self._heads = heads

    def pages(self, group: Group) -> Pages:
        """Where a group's pages are."""
        kv, is_draft = self.of(group), group.more_of is not None
        base, layer, block = kv.ctypes.data, kv.strides[0], kv.strides[1]
        stateful, latent = group.kind == "recurrent", group.replicated
        num_heads = 2 if is_draft else len(self._heads)
        letters = "NHC" if is_draft or num_heads == 1 else "HNC"
        order = native_order(f"vllm/strided-{letters}/b{BLOCK}/bfloat16")
        if stateful:
            order = NativeOrder("vllm/state-fake/1", BLOCK, "float32", ("D", "D"))
        return Pages(
            group=LayerGroup(
                index=group.index, kind=group.kind, num_layers=len(kv), num_kv_heads=num_heads,
                head_dim=STATE // 4 if stateful else 4 if latent else 2,
                states=1 if stateful or latent else 2,
                dtype=order.dtype, window=group.reach,
            ),
            order=order,
            layer_names=(DRAFT,) if is_draft else NAMES,
            block_tokens=BLOCK,
            page_bytes=STATE if stateful else block,
            num_blocks=kv.shape[1],
            bases=np.array([base + i * layer for i in range(len(kv))], np.int64),
            strides=np.full(len(kv), block, np.int64),
            device=torch.device("cpu"),
            compute_dtype=torch.bfloat16,
        )  # fmt: skip

    def of(self, group: Group) -> npt.NDArray[np.uint8]:
        """The blocks that a group's layers have."""
        return self.kv if group.more_of is None else self.draft

    def wanted(self, digests: Sequence[bytes], group: Group) -> npt.NDArray[np.uint8]:
        """What a group's blocks must hold of these tokens, shaped as those."""
        words = self.words(digests, group.index, replicated=group.replicated)
        return words if group.more_of is None else np.tile(words[:1], 2)

    def words(
        self, digests: Sequence[bytes], group: int = 0, *, replicated: bool = False
    ) -> npt.NDArray[np.uint8]:
        """What ``kv`` must hold of these tokens; the same on every rank, if replicated."""
        plain = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, WORD)
        heads = range(1) if replicated else self._heads
        first = group * 37 + 1
        salts = [[np.uint8(first + i * 16 + head) for head in heads] for i in range(LAYERS)]
        if len(heads) == 1:
            return np.stack([plain ^ salt for (salt,) in salts])
        return np.stack([np.stack([plain ^ salt for salt in some], axis=1) for some in salts])

    def state(self, digest: bytes, group: int) -> npt.NDArray[np.uint8]:
        """The state after the tokens of this digest: (L, 96)."""
        return np.tile(self.words([digest], group)[:, 0], (1, STATE // WORD))

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The blocks as bytes: (L, blocks, 128)."""
        return self.kv.reshape(LAYERS, -1, PAGE)


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
