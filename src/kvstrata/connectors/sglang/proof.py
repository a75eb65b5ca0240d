"""A proof that a page's bytes lie where `pages` says: known numbers go into it by SGLang's own
views and copies of the pool, and each has to be found in its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvstrata.connectors.digits import rounds, words
from kvstrata.connectors.sglang.pages import BytePages, Bytes, Pages, TokenPages
from kvstrata.errors import LayoutMismatch

REMEDY = (
    "KVStrata would store and serve wrong bytes here, so it leaves this engine's KV uncached; "
    "report this line with SGLang's version and its arguments"
)


@torch.no_grad()
def prove(pages: Pages, pool: Any) -> None:
    """Prove the addresses and the byte order of a pool's pages; its last page is used and restored.

    Must run when nothing else uses the pool: at registration.

    Raises:
        LayoutMismatch: a number was elsewhere.
    """
    index = (pages.num_indices // pages.stride - 1) * pages.stride
    saved = np.empty(pages.nbytes, np.uint8)
    pages.read(index, saved)
    try:
        if isinstance(pages, TokenPages):
            _prove_tokens(pages, pool, index)
        elif isinstance(pages, BytePages):
            _prove_bytes(pages, pool, index)
    except LayoutMismatch:
        raise
    except Exception as error:
        raise LayoutMismatch(
            f"the self-test of pool {pages.name} failed: {error}. {REMEDY}"
        ) from error
    finally:
        pages.write(index, saved)


def _prove_tokens(pages: TokenPages, pool: Any, index: int) -> None:
    """Every element gets a number of its own, by the views that SGLang's copies go through."""
    payload = np.empty(pages.nbytes, np.uint8)
    for digits in rounds(pages.portable_shape, pages.dtype):
        written = words(digits, pages.dtype)
        for layer in range(pages.group.num_layers):
            for state, view in enumerate(_layer_views(pool, layer)):
                # (H, T, D) as SGLang keeps a layer: (tokens, H, D), or (pages, tokens, H, D)
                page = digits[layer, state].transpose(0, 1).to(pool.dtype)
                if view.ndim == 4:
                    view[index // pages.stride] = page
                else:
                    view[index : index + pages.stride] = page
        payload[:] = 0
        pages.read(index, payload)
        found = pages.portable(payload, pages.order).view(written.dtype)
        if wrong := int(np.count_nonzero(found != written)):
            raise LayoutMismatch(
                f"pool {pages.name} does not keep its KV as {pool.layout} says: {wrong} of "
                f"{written.size} elements are elsewhere. {REMEDY}"
            )
        portable = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
        for order, one in ((pages.order, payload), ("", portable)):
            pages.write(index, np.zeros(pages.nbytes, np.uint8))
            pages.write(index, one, order)
            _look(pages, pool, index, written)


def _look(pages: TokenPages, pool: Any, index: int, written: Any) -> None:
    """Whether SGLang's own views have these numbers, (L, S, H, T, D), in a page."""
    for layer in range(pages.group.num_layers):
        for state, view in enumerate(_layer_views(pool, layer)):
            at = (
                view[index // pages.stride]
                if view.ndim == 4
                else view[index : index + pages.stride]
            )
            back = words(at.transpose(0, 1).float(), pages.dtype)
            if not np.array_equal(back, written[layer, state]):
                raise LayoutMismatch(f"pool {pages.name} does not take pages back. {REMEDY}")


def _layer_views(pool: Any, layer: int) -> list[torch.Tensor]:
    """SGLang's own views of a layer, keys and values."""
    if hasattr(pool, "k_data_refs"):
        return [pool.k_data_refs[layer], pool.v_data_refs[layer]]
    if pool.layout == "page_first_direct":
        # SGLang 0.5.23 has no view of a layer here: its copies take pages, then the layer.
        return [pool.kv_buffer[:, layer]]
    return [pool.data_refs[layer]]


def _prove_bytes(pages: BytePages, pool: Any, index: int) -> None:
    """Random bytes put in by SGLang's addresses are all of what SGLang says that a page is."""
    flat = pool.get_data_page(index, flat=True)
    size = flat.numel() * flat.element_size()
    if size != pages.nbytes:
        raise LayoutMismatch(
            f"a page of pool {pages.name} has {size} bytes, of which SGLang tells the addresses of "
            f"{pages.nbytes}. {REMEDY}"
        )
    noise = np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8)
    pages.write(index, np.ascontiguousarray(noise))
    one = _bytes(pool.get_data_page(index, flat=True))
    pages.write(index, np.zeros(size, np.uint8))
    if _bytes(pool.get_data_page(index, flat=True)).any():
        raise LayoutMismatch(f"the addresses of pool {pages.name} are no whole page. {REMEDY}")
    pool.set_from_flat_data_page(index, torch.from_numpy(one.copy()).view(flat.dtype))
    back = np.empty(size, np.uint8)
    pages.read(index, back)
    if not np.array_equal(back, noise):
        raise LayoutMismatch(f"pool {pages.name} does not keep what it is given. {REMEDY}")


def _bytes(page: torch.Tensor) -> Bytes:
    flat: Bytes = page.contiguous().view(torch.uint8).reshape(-1).numpy()
    return flat
