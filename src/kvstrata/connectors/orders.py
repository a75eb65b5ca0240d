"""Which byte orders of vLLM's other engines read, where they share with it."""

from __future__ import annotations

_ON_CPU = [("cpu-vec", (128, 32, 64)), ("cpu-amx", (128, 32, 64))]
_ON_GPU = [("strided-NHC", (16, 128, 32, 64)), ("strided-HNC", (16, 128, 32, 64))]


def foreign_orders(page_tokens: int, dtype: str, device: str = "cpu") -> tuple[str, ...]:
    """Their names: of blocks that fill a page, the likeliest first; 14 at most.

    Args:
        page_tokens: tokens of a page, or a chunk.
        dtype: of the KV's elements, as torch spells it.
        device: of the engine, ``cpu`` or another; vLLM's most likely has the same.
    """
    orders = [*_ON_CPU, *_ON_GPU] if device == "cpu" else [*_ON_GPU, *_ON_CPU]
    return tuple(
        f"vllm/{order}/b{block}/{dtype}"
        for order, blocks in orders
        for block in blocks
        if page_tokens % block == 0
    )
