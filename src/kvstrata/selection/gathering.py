"""From positions to what is kept: the rows of a context's own cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvstrata.layout import ITEM_BYTES, WORDS
from kvstrata.selection.evidence import Context
from kvstrata.selection.kept import Kept
from kvstrata.selection.merging import Merging

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def gathered(
    context: Context,
    counts: torch.Tensor,
    positions: list[list[torch.Tensor]],
    merging: Merging | None = None,
) -> Kept:
    """The rows at these positions.

    Args:
        context: whose cache it is.
        counts: (L, H) int64.
        positions: for each layer and head, int64, ascending.
        merging: puts what is dropped into them; None: it is gone.
    """
    keys, values = [], []
    for layer, of_heads in enumerate(positions):
        every_key, every_value = context.layers[layer]
        for head, kept in enumerate(of_heads):
            if merging is None:
                keys.append(every_key[head, kept])
                values.append(every_value[head, kept])
                continue
            of = context.keys(layer)[head], context.values(layer)[head]
            new_keys, new_values = merging.merged(*of, kept)
            keys.append(new_keys.to(every_key.dtype))
            values.append(new_values.to(every_value.dtype))
    flat = torch.cat([kept for of_heads in positions for kept in of_heads])
    dtype = str(keys[0].dtype).removeprefix("torch.")
    return Kept(
        counts.numpy().astype(np.int32),
        flat.cpu().numpy().astype(np.int32),
        _words(torch.cat(keys), dtype),
        _words(torch.cat(values), dtype),
        dtype,
        context.length,
    )


def _words(rows: torch.Tensor, dtype: str) -> Any:
    size = ITEM_BYTES[dtype]
    # torch has no unsigned words of every width; the bits are the same.
    return rows.contiguous().view(_SIGNED[size]).cpu().numpy().view(WORDS[size])
