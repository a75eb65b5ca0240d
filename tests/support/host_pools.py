"""Host pools as SGLang makes them, without SGLang: real tensors, and its views of a layer.

The orders are those that SGLang's source documents; ``tests/sglang/test_kit.py`` has its own pools.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

LAYOUTS = ("layer_first", "page_first", "page_first_direct")


class HostPool:
    """Keys and values of layers, or a latent where ``states`` is 1.

    Args:
        layout: one of `LAYOUTS`.
        pages: how many it has.
        page_tokens: tokens of each.
        layers, heads, dim, states, dtype: what a token has.
    """

    def __init__(
        self,
        layout: str,
        pages: int = 4,
        page_tokens: int = 16,
        layers: int = 2,
        heads: int = 3,
        dim: int = 8,
        states: int = 2,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.layout, self.page_size, self.size = layout, page_tokens, pages * page_tokens
        self.layer_num = self.target_layer_num = layers
        self.start_layer, self.dtype = 0, dtype
        if states == 1:
            heads, self.kv_cache_dim = 1, dim
        else:
            self.head_num, self.head_dim, self.v_head_dim = heads, dim, dim
        shape = {
            "layer_first": (layers, self.size, heads, dim),
            "page_first": (self.size, layers, heads, dim),
            "page_first_direct": (pages, layers, page_tokens, heads, dim),
        }[layout]
        self.kv_buffer = torch.zeros((2, *shape) if states == 2 else shape, dtype=dtype)
        by_layer = [
            list(one if layout == "layer_first" else one.transpose(0, 1))
            for one in (self.kv_buffer if states == 2 else [self.kv_buffer])
        ]
        if states == 2:
            self.k_data_refs, self.v_data_refs = by_layer
        elif layout != "page_first_direct":
            self.data_refs = by_layer[0]

    def words(self) -> npt.NDArray[Any]:
        """All of it as integers of an element's width, in the order of its layout."""
        found: npt.NDArray[Any] = self.kv_buffer.view(torch.uint8).numpy()
        return found.view(f"u{self.dtype.itemsize}")

    def fill(self, seed: int) -> None:
        """Noise everywhere."""
        noise = np.random.default_rng(seed).bytes(self.words().nbytes)
        self.words().reshape(-1).view(np.uint8)[:] = np.frombuffer(noise, np.uint8)

    def element(self, page: int, layer: int, state: int, head: int, token: int, at: int) -> Any:
        """One element's place in `words`."""
        row = page * self.page_size + token
        place: tuple[int, ...] = {
            "layer_first": (layer, row, head, at),
            "page_first": (row, layer, head, at),
            "page_first_direct": (page, layer, token, head, at),
        }[self.layout]
        return (state, *place) if hasattr(self, "head_num") else place
