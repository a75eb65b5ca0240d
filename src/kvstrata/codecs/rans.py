"""Interleaved rANS: the loops of `kvstrata.codecs.entropy`, which is their page.

Eight states take turns, so that a processor works on all of them at once. Each codes two symbols,
of 12 bits at most, between two looks at whether it needs a word: half the looking. A state between
two steps is at least 2**24, so that two symbols leave it at least 1, and below 2**56, so that one
word of 32 bits is always enough and always fits.

Symbols are bytes, plus 128, with 0 for an escape. Rows are columns of a block, ``index`` (blocks,
n, width); `kvstrata.codecs.entropy_models.Tables` has what is looked up.

Source: J. Duda, asymmetric numeral systems, arXiv:1311.2540; F. Giesen, interleaved entropy coders,
arXiv:1402.3392; differs: two symbols between two looks.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.codecs.entropy_models import PLAIN, PROB_BITS
from kvstrata.layout import Bytes

Integers: TypeAlias = npt.NDArray[np.int64]

LANES = 8
STEP = 2 * LANES
"""Symbols between two looks at the states."""
STATE_BITS = 2 * PROB_BITS
STATE = 1 << STATE_BITS
"""A state between two steps is at least this, and less than ``STATE << WORD_BITS``."""
WORD_BITS = 32


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def push(
    index: Bytes,
    classes: Bytes,
    order: Integers,
    frequency: Integers,
    start: Integers,
    inverse: npt.NDArray[np.float64],
    words: npt.NDArray[np.uint32],
    word: int,
    states: Integers,
) -> int:
    """Push all rows, the last one first; the position of the first word."""
    _, n, width = index.shape
    for k in range(len(order) - 1, -1, -1):
        class_ = classes[order[k]]
        if class_ == 0 or class_ == PLAIN:
            continue
        row = index[order[k] // width, :, order[k] % width]
        of_class = frequency[class_], start[class_], inverse[class_]
        begin = n // STEP * STEP
        if begin < n:
            word = _push_few(row[begin:], n - begin, of_class, words, word, states)
        while begin > 0:
            begin -= STEP
            word = _push_few(row[begin:], STEP, of_class, words, word, states)
    return word


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _push_few(
    row: Bytes,
    count: int,
    of_class: tuple[Integers, Integers, npt.NDArray[np.float64]],
    words: npt.NDArray[np.uint32],
    word: int,
    states: Integers,
) -> int:
    """Push the first ``count`` of a row, at most `STEP`, the last one first."""
    frequencies, starts, inverses = of_class
    firsts, seconds = min(count, LANES), max(count - LANES, 0)
    for lane in range(firsts - 1, seconds - 1, -1):
        limit = frequencies[row[np.uint64(lane)]] << (STATE_BITS + WORD_BITS - PROB_BITS)
        word = _make_room(limit, lane, words, word, states)
    for lane in range(seconds - 1, -1, -1):
        # For both symbols, as if they were one of 24 bits.
        both = frequencies[row[np.uint64(lane)]] * frequencies[row[np.uint64(LANES + lane)]]
        limit = both << (STATE_BITS + WORD_BITS - 2 * PROB_BITS)
        word = _make_room(limit, lane, words, word, states)
    for lane in range(seconds - 1, -1, -1):
        _push(row[np.uint64(LANES + lane)], lane, frequencies, starts, inverses, states)
    for lane in range(firsts - 1, -1, -1):
        _push(row[np.uint64(lane)], lane, frequencies, starts, inverses, states)
    return word


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _push(
    at: int,
    lane: int,
    frequencies: Integers,
    starts: Integers,
    inverses: npt.NDArray[np.float64],
    states: Integers,
) -> None:
    """A symbol onto a state."""
    state, often = states[lane], frequencies[at]
    # One too few at times, never one too many: so the inverses are rounded.
    quotient = np.int64(np.float64(state) * inverses[at])
    quotient -= (often - 1 - (state - quotient * often)) >> 63
    states[lane] = state + quotient * ((1 << PROB_BITS) - often) + starts[at]


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _make_room(
    limit: int, lane: int, words: npt.NDArray[np.uint32], word: int, states: Integers
) -> int:
    """A word leaves a state that is not below ``limit``."""
    state = states[lane]
    # Written in any case and kept only if it counts. By a sign bit: a comparison may become a
    # branch, mispredicted every third time.
    full = (limit - 1 - state) >> 63
    words[np.uint64(word - 1)] = np.uint32(state)
    states[lane] = state >> (full & WORD_BITS)
    return int(word + full)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pop(
    words: npt.NDArray[np.uint32],
    word: int,
    num_words: int,
    classes: Bytes,
    order: Integers,
    table: npt.NDArray[np.uint32],
    states: Integers,
    index: Bytes,
) -> int:
    """Pop all rows; the position of the next word, -1 if there is none."""
    _, n, width = index.shape
    for k in range(len(order)):
        class_ = classes[order[k]]
        row = index[order[k] // width, :, order[k] % width]
        if class_ == 0 or class_ == PLAIN:
            row[:] = 128 if class_ == 0 else 0
            continue
        slots = table[class_]
        begin = 0
        while begin + STEP <= n:
            if word > num_words:
                return -1
            _pop(slots, states, row, begin, LANES)
            _pop(slots, states, row, begin + LANES, LANES)
            word = _refill(words, word, states)
            begin += STEP
        if begin < n:
            if word > num_words:
                return -1
            _pop(slots, states, row, begin, min(LANES, n - begin))
            _pop(slots, states, row, begin + LANES, max(0, n - begin - LANES))
            word = _refill(words, word, states)
    return word if word <= num_words else -1


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _pop(
    slots: npt.NDArray[np.uint32], states: Integers, row: Bytes, begin: int, count: int
) -> None:
    """One symbol of each of the first ``count`` states."""
    low = (1 << PROB_BITS) - 1
    for lane in range(count):
        state = states[lane]
        entry = np.int64(slots[state & low])
        states[lane] = (entry >> 8 & low) * (state >> PROB_BITS) + (entry >> 20)
        row[np.uint64(begin + lane)] = np.uint8(entry)


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _refill(words: npt.NDArray[np.uint32], word: int, states: Integers) -> int:
    """Every state that needs a word takes one; the position of the next word."""
    # By a sign bit again. In a loop of its own: that is a quarter faster.
    for lane in range(LANES):
        state = states[lane]
        short = (state - STATE) >> 63
        states[lane] = state << (short & WORD_BITS) | (np.int64(words[np.uint64(word)]) & short)
        word -= short
    return int(word)
