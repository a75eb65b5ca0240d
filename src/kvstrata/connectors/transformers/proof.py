"""A proof that a cache keeps what `contents` says: known numbers go into it by transformers' own
`update`, are taken out as chunks, and go on in another cache as they did in the first.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch

from kvstrata.connectors.digits import rounds, words
from kvstrata.connectors.transformers.contents import Filling, forget_past, take
from kvstrata.connectors.transformers.kinds import Kinds, new_cache
from kvstrata.errors import LayoutMismatch

REMEDY = (
    "KVStrata would store and serve wrong bytes here, so it leaves this model uncached; report "
    "this line with the version of transformers and the model's configuration"
)
CHUNK = 16
"""Tokens of a chunk here: what is proved does not depend on it, and the numbers are fewer."""
MAX_NUMBERS = 1 << 24
"""For longer windows it is not tried where they end, lest the start take long."""


@torch.no_grad()
def prove(model: Any, kinds: Kinds) -> None:
    """Prove it, with caches of the model's own kind.

    Raises:
        LayoutMismatch: a number was elsewhere.
    """
    short = Kinds(tuple(replace(kind, chunk_tokens=CHUNK) for kind in kinds.each), kinds.device)
    num_chunks = max(kind.needs for kind in short.each) + 2
    per_token = max(prod(kind.group.portable_shape(1)) for kind in short.each)
    try:
        _prove(model, short, num_chunks if num_chunks * CHUNK * per_token <= MAX_NUMBERS else 3)
    except LayoutMismatch:
        raise
    except Exception as error:
        raise LayoutMismatch(f"the self-test of the cache failed: {error}. {REMEDY}") from error


def _prove(model: Any, kinds: Kinds, num_chunks: int) -> None:
    size = kinds.chunk_tokens
    total = num_chunks * size + 3
    # Every kind is tested with the same rounds: those that the one with most numbers needs.
    shapes = [kind.group.portable_shape(total) for kind in kinds.each]
    written = [list(rounds(s, k.group.dtype)) for s, k in zip(shapes, kinds.each, strict=True)]
    for number in range(max(map(len, written))):
        digits = [each[number % len(each)] for each in written]
        cache = new_cache(model)
        cache.activate_past_recording()
        # Cut as prompt and answer are: once inside a chunk, and token by token at the end.
        ends = [0, size + 5, total - 2, total - 1, total]
        for begin, end in pairwise(ends):
            last = _update(cache, kinds, digits, begin, end)
        taken = take(cache, kinds, 0, range(total))
        if taken is None:
            raise LayoutMismatch(f"a cache does not hold what it was given. {REMEDY}")
        filling = Filling(kinds, num_chunks)
        for kind, numbers in zip(kinds.each, digits, strict=True):
            for chunk in range(num_chunks):
                payload = np.zeros(kind.nbytes, np.uint8)
                taken.get(kind, chunk, payload)
                expected = words(
                    numbers[:, :, :, chunk * size : (chunk + 1) * size], kind.group.dtype
                )
                if not np.array_equal(payload.view(expected.dtype), expected.reshape(-1)):
                    raise LayoutMismatch(f"a chunk taken from a cache is another one. {REMEDY}")
                if not kind.needs or chunk >= num_chunks - kind.needs:
                    filling.put(kind, chunk, payload)
        other = new_cache(model)
        other.activate_past_recording()
        filling.pour(other, num_chunks)
        if other.get_seq_length() != num_chunks * size:
            raise LayoutMismatch(f"a filled cache has {other.get_seq_length()} tokens. {REMEDY}")
        for begin in range(num_chunks * size, total):
            again = _update(other, kinds, digits, begin, begin + 1)
        for layer, (ours, theirs) in enumerate(zip(again, last, strict=True)):
            if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                raise LayoutMismatch(f"a filled cache goes on otherwise, layer {layer}. {REMEDY}")
        if cache.get_mask_sizes(1, 0) != other.get_mask_sizes(1, 0):
            raise LayoutMismatch(f"a filled cache has another mask. {REMEDY}")
        behind = take(other, kinds, num_chunks, range(total))
        if behind is None:
            raise LayoutMismatch(f"a filled cache does not record what follows. {REMEDY}")
        forget_past(other, kinds)


def _update(
    cache: Any, kinds: Kinds, digits: list[torch.Tensor], begin: int, end: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give each layer these tokens; what it hands to attention, layer by layer."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for kind, numbers in zip(kinds.each, digits, strict=True):
        some = numbers[:, :, :, begin:end].to(kind.dtype).to(kinds.device)
        for row, layer in enumerate(kind.layers):
            found[layer] = cache.update(some[row, 0][None], some[row, 1][None], layer)
    return [found[layer] for layer in sorted(found)]
