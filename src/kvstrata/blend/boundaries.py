"""Where a text is cut by what it says: the same cuts wherever it stands, and around an edit.

A cut is behind a token at which a hash of the last few tokens has a certain form, so an edit moves
the cuts near it and no others: behind it the pieces of an edited file are those of the file before.

Source: FastCDC, Xia et al., USENIX ATC 2016; differs: over token ids, and with one mask.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstrata.blend.segments import MAX_SEGMENTS
from kvstrata.keys import Tokens, token_ids

WINDOW = 16
"""Tokens that decide about a cut."""
LEAST, MOST = 64, 1024
"""Tokens of a piece."""
MASK_BITS = 8
"""A cut is to be expected every 2^8 tokens behind the least of a piece."""

_Words = npt.NDArray[np.uint64]


def pieces(tokens: Tokens) -> list[range]:
    """The pieces of a prompt that end at a cut, the first `MAX_SEGMENTS` of them.

    What lies behind the last cut is none: what follows may go on with it.

    Args:
        tokens: ids.
    Raises:
        UsageError: an id is out of range.
    """
    ids = token_ids(tokens)
    cuts = np.flatnonzero(_hashes(ids) >> np.uint64(64 - MASK_BITS) == 0) + 1
    found: list[range] = []
    start = 0
    while len(found) < MAX_SEGMENTS:
        next_cut = int(np.searchsorted(cuts, start + LEAST))
        stop = int(cuts[next_cut]) if next_cut < len(cuts) else len(ids) + 1
        stop = min(stop, start + MOST)
        if stop > len(ids):
            break
        found.append(range(start, stop))
        start = stop
    return found


def _hashes(ids: npt.NDArray[np.integer]) -> _Words:
    """A hash of the last `WINDOW` tokens up to each; of fewer at the beginning."""
    words = mixed(ids.astype(np.uint64))
    weights = mixed(np.arange(WINDOW, dtype=np.uint64)) | np.uint64(1)
    hashes = np.zeros(len(ids), np.uint64)
    for back, weight in enumerate(weights[: len(ids)]):
        hashes[back:] += words[: len(ids) - back] * weight
    return mixed(hashes)


def mixed(words: _Words) -> _Words:
    """SplitMix64's finish: every bit depends on all."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
