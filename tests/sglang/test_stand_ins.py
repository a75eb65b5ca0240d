"""The stand-ins for SGLang's compiled copies, against a loop over tokens, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
copies = pytest.importorskip("sgl_kernel.kvcacheio")
kernels = pytest.importorskip("sgl_kernel")

LAYERS, PAGES, PAGE, HEADS, SIZE = 3, 5, 4, 2, 8
TOKENS = PAGES * PAGE


def engine_pool(seed: int) -> list[Any]:
    """Keys of all layers, then values of all layers: (tokens, heads, size)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(TOKENS, HEADS, SIZE, generator=generator) for _ in range(2 * LAYERS)]


def host_pool() -> list[Any]:
    """Keys and values: (pages, layers, tokens of a page, heads, size)."""
    return [torch.zeros(PAGES, LAYERS, PAGE, HEADS, SIZE) for _ in range(2)]


def tokens_of(*pages: int) -> Any:
    return torch.tensor([page * PAGE + token for page in pages for token in range(PAGE)])


def test_pages_go_out_and_come_back_elsewhere() -> None:
    engine, host, other = engine_pool(0), host_pool(), engine_pool(1)
    untouched = [layer.clone() for layer in other]
    here, there, back = tokens_of(4, 0), tokens_of(1, 3), tokens_of(2, 1)
    copies.transfer_kv_all_layer_direct_lf_pf(
        src_ptrs=engine, dst_ptrs=host, src_indices=here, dst_indices=there, page_size=PAGE
    )
    for state in range(2):
        for layer in range(LAYERS):
            for source, target in zip(here.tolist(), there.tolist(), strict=True):
                page, place = divmod(target, PAGE)
                kept = host[state][page, layer, place]
                assert torch.equal(kept, engine[state * LAYERS + layer][source])
            assert not host[state][[0, 2, 4], layer].any()
    for layer in range(LAYERS):
        copies.transfer_kv_per_layer_direct_pf_lf(
            src_ptrs=host, dst_ptrs=[other[layer], other[LAYERS + layer]],
            src_indices=there, dst_indices=back, layer_id=layer, page_size=PAGE,
        )  # fmt: skip
    for mine, theirs, before in zip(engine, other, untouched, strict=True):
        assert torch.equal(theirs[back], mine[here])
        rest = tokens_of(0, 3, 4)
        assert torch.equal(theirs[rest], before[rest])


def test_layers_are_copied_as_they_are() -> None:
    source, target = engine_pool(0), engine_pool(1)
    untouched = [layer.clone() for layer in target]
    here, there = tokens_of(0, 2), tokens_of(3, 1)
    copies.transfer_kv_direct(
        src_layers=source, dst_layers=target, src_indices=here, dst_indices=there, page_size=PAGE
    )
    for mine, theirs, before in zip(source, target, untouched, strict=True):
        assert torch.equal(theirs[there], mine[here])
        rest = tokens_of(0, 2, 4)
        assert torch.equal(theirs[rest], before[rest])


def test_a_kernel_that_is_not_there_raises() -> None:
    with pytest.raises(NotImplementedError, match="build_tree_kernel_efficient"):
        kernels.build_tree_kernel_efficient(1, 2)
