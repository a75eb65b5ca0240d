"""Entropy coding of small signed integers: interleaved rANS with fixed models.

A row of symbols (a channel, say) is coded by one of `NUM_CLASSES` distributions of mean zero and
growing width. Only the row's class is stored, by the caller, one byte a row; no frequencies, which
for the 128 symbols of a row would cost as much as they save. A row of zeros costs nothing; a row
that no distribution fits costs 16 bits a symbol. Single symbols beyond the reach of their class,
-127 to 127 at the most, are coded as an escape and follow plainly in a stream of their own.

A stream::

    uint32: number of escapes | uint32 x 16: states | uint16: words ... | int16: escapes ...

all little endian, words and escapes in the order in which the decoder needs them: rows by class,
then by number, and 16 neighbouring symbols of a row for the 16 states. 32-bit states, at least
2**16 between symbols, take in one word at a time; all of them end at 2**16, which is checked.

Source: J. Duda, asymmetric numeral systems, arXiv:1311.2540; F. Giesen, interleaved entropy coders,
arXiv:1402.3392.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.codecs.base import corrupt
from kvstrata.codecs.entropy_models import (
    NUM_CLASSES,
    PLAIN,
    PROB_BITS,
    Symbols,
    classify,
    tables,
)
from kvstrata.errors import UsageError
from kvstrata.layout import Bytes

__all__ = ["NUM_CLASSES", "Symbols", "bound", "classify", "decode", "encode"]

_LANES = 16
_STATE = 1 << 16  # a state between two symbols is at least this
_HEADER = 4 + 4 * _LANES


def bound(rows: int, n: int) -> int:
    """The most bytes that `encode` writes for symbols with the classes that `classify` chose."""
    return _HEADER + 2 * rows * n + rows * n // 64 + 64


def encode(symbols: Symbols, classes: Bytes, out: Bytes) -> int:
    """Encode all rows as one stream.

    Args:
        symbols: (rows, n), C-contiguous.
        classes: (rows,), from `classify`.
        out: at least ``bound(rows, n)`` bytes.
    Returns:
        The number of bytes written to ``out``, from its beginning.
    Raises:
        UsageError: a class does not exist or does not fit its row, or ``out`` is too short.
    """
    table = tables()
    if len(classes) != len(symbols) or (classes >= NUM_CLASSES).any():
        raise UsageError("a class for each row, please, that exists")
    # What is pushed last is popped first, so both streams grow from the end of their buffers.
    # The word too many is written in front of the last one, and never kept.
    words = np.empty(symbols.size + 1, np.uint16)
    escapes = np.empty(symbols.size, np.int16)
    states = np.full(_LANES, _STATE, np.uint64)
    order = np.argsort(classes, kind="stable")
    word, escape = _encode(
        symbols, classes, order, table.frequency, table.start, table.reciprocal, table.radius,
        words, escapes, states,
    )  # fmt: skip
    if word < 0:
        raise UsageError("a row of class 0 is not all zeros")
    parts = (
        np.array([len(escapes) - escape], "<u4"),
        states.astype("<u4"),
        words[word:].astype("<u2", copy=False),
        escapes[escape:].astype("<i2", copy=False),
    )
    size = sum(part.nbytes for part in parts)
    if size > len(out):
        raise UsageError(f"{len(out)} bytes to encode into, not {size}")
    end = 0
    for part in parts:
        out[end : end + part.nbytes] = part.view(np.uint8)
        end += part.nbytes
    return size


def decode(data: Bytes, classes: Bytes, out: Symbols) -> None:
    """Decode what `encode` wrote.

    Args:
        data: exactly that; checked, for it may be anything.
        classes: (rows,), as encoded; checked too.
        out: (rows, n), C-contiguous, overwritten.
    Raises:
        CorruptObject: no encoder wrote these bytes for these classes.
    """
    table = tables()
    if len(classes) != len(out) or (classes >= NUM_CLASSES).any():
        raise corrupt("a class that does not exist")
    if len(data) < _HEADER:
        raise corrupt("shorter than the states of its symbols")
    num_escapes = int(data[:4].copy().view("<u4")[0])
    num_words = (len(data) - _HEADER) // 2 - num_escapes
    if num_words < 0 or len(data) % 2 or num_escapes > out.size:
        raise corrupt(f"{num_escapes} escapes do not fit")
    states = data[4:_HEADER].copy().view("<u4").astype(np.uint32, copy=False)
    # The loops look ahead by up to _LANES words.
    words = np.zeros(num_words + _LANES, "<u2")
    begin = _HEADER + 2 * num_words
    words[:num_words].view(np.uint8)[:] = data[_HEADER:begin]
    escapes = data[begin:].copy().view("<i2").astype(np.int16, copy=False)
    order = np.argsort(classes, kind="stable")
    good = _decode(words, np.uint64(num_words), escapes, classes, order, table.decode, states, out)
    if not good:
        raise corrupt("its symbols do not end where they should")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(
    symbols: Symbols,
    classes: Bytes,
    order: npt.NDArray[np.int64],
    frequency: npt.NDArray[np.uint64],
    start: npt.NDArray[np.uint64],
    reciprocal: npt.NDArray[np.uint64],
    radius: Symbols,
    words: npt.NDArray[np.uint16],
    escapes: Symbols,
    states: npt.NDArray[np.uint64],
) -> tuple[int, int]:
    """Positions of the first word and the first escape; -1, -1 if a row has the wrong class."""
    num_rows, n = symbols.shape
    index = np.empty(n, np.uint8)
    word, escape = np.uint64(len(words)), len(escapes)
    for k in range(num_rows - 1, -1, -1):
        class_, row = classes[order[k]], symbols[order[k]]
        reach = radius[class_]
        if class_ == 0 or class_ == PLAIN:
            for i in range(n - 1, -1, -1):
                if class_ == PLAIN:
                    escape -= 1
                    escapes[escape] = row[i]
                elif row[i] != 0:
                    return -1, -1
            continue
        num_escapes = 0
        for i in range(n):
            near = (row[i] <= reach) & (row[i] >= -reach)
            index[i] = np.uint8(row[i] + 128) if near else np.uint8(0)
            num_escapes += not near
        if num_escapes:
            for i in range(n - 1, -1, -1):
                if index[i] == 0:
                    escape -= 1
                    escapes[escape] = row[i]
        frequencies, starts, reciprocals = frequency[class_], start[class_], reciprocal[class_]
        end = n
        while end > 0:
            begin = (end - 1) // _LANES * _LANES
            for i in range(end - 1, begin - 1, -1):
                lane, at = np.uint64(i - begin), index[i]
                state, often = states[lane], frequencies[at]
                # The word is written in any case and kept only if the state is too large. By a
                # sign bit: a comparison may become a branch, mispredicted every fourth symbol.
                limit = often << np.uint64(32 - PROB_BITS)
                full = (limit - np.uint64(1) - state) >> np.uint64(63)
                words[word - np.uint64(1)] = np.uint16(state)
                word -= full
                state = state >> (full << np.uint64(4))
                # state < often * 2**20 now, for which this is the exact quotient.
                quotient = state * reciprocals[at] >> np.uint64(44)
                skip = np.uint64(1 << PROB_BITS) - often
                states[lane] = state + quotient * skip + starts[at]
            end = begin
    return np.int64(word), escape


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    words: npt.NDArray[np.uint16],
    num_words: np.uint64,
    escapes: Symbols,
    classes: Bytes,
    order: npt.NDArray[np.int64],
    table: npt.NDArray[np.uint32],
    states: npt.NDArray[np.uint32],
    out: Symbols,
) -> bool:
    num_rows, n = out.shape
    word, escape = np.uint64(0), 0
    for k in range(num_rows):
        class_, row = classes[order[k]], out[order[k]]
        if class_ == 0:
            row[:] = 0
            continue
        num_escapes = 0
        if class_ == PLAIN:
            row[:] = -128
            num_escapes = n
        else:
            slots = table[class_]
            begin = np.uint64(0)
            while begin + np.uint64(_LANES) <= np.uint64(n):
                if word > num_words:
                    return False
                word = _step(slots, states, words, word, row, begin, _LANES)
                begin += np.uint64(_LANES)
            if word > num_words:
                return False
            word = _step(slots, states, words, word, row, begin, np.int64(n) - np.int64(begin))
            for i in range(n):
                num_escapes += row[i] == -128
        if num_escapes:
            if escape + num_escapes > len(escapes):
                return False
            for i in range(n):
                if row[i] == -128:
                    row[i] = escapes[escape]
                    escape += 1
    ended = word == num_words and escape == len(escapes)
    for lane in range(_LANES):
        ended &= states[lane] == np.uint32(_STATE)
    return ended


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _step(
    slots: npt.NDArray[np.uint32],
    states: npt.NDArray[np.uint32],
    words: npt.NDArray[np.uint16],
    word: np.uint64,
    row: Symbols,
    begin: np.uint64,
    count: int,
) -> np.uint64:
    """One symbol of each of the first ``count`` states; returns the next word's position."""
    low = np.uint32((1 << PROB_BITS) - 1)
    for lane in range(count):
        state = states[lane]
        entry = slots[state & low]
        often = (entry >> np.uint32(8)) & low
        states[lane] = often * (state >> np.uint32(PROB_BITS)) + (entry >> np.uint32(20))
        row[begin + np.uint64(lane)] = np.int16(entry & np.uint32(0xFF)) - np.int16(128)
    # In a loop of its own: that is a third faster. By a sign bit again; numba computes in 64 bits.
    for lane in range(count):
        state = np.uint64(states[lane])
        short = ((state >> np.uint64(16)) - np.uint64(1)) >> np.uint64(63)
        taken = np.uint64(words[word]) & (np.uint64(0) - short)
        states[lane] = np.uint32(state << (short << np.uint64(4)) | taken)
        word += short
    return word
