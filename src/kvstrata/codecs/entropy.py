"""Entropy coding of small signed integers: interleaved rANS with fixed models.

A row of symbols (a channel, say) is coded by one of `NUM_CLASSES` distributions of mean zero and
growing width. Only the row's class is stored, by the caller, one byte a row; no frequencies, which
for the 128 symbols of a row would cost as much as they save. A row of zeros costs nothing; a row
that no distribution fits costs 16 bits a symbol. Single symbols beyond the reach of their class,
-127 to 127 at the most, are coded as an escape and follow plainly in a stream of their own.

Rows lie side by side, as channels of a token do: a block is (n, width), a row one of its columns.
A stream holds one or more parts, each of blocks of one shape::

    uint32: number of escapes | uint64 x 8: states | uint32: words ... | int16: escapes ...

all little endian and in the order in which the decoder needs them. Words: part by part, the rows
of a part by class, then by number, 16 neighbouring symbols of a row in turn: the first eight by
states 0 to 7, the other eight by the same states. Then each state below 2**24 takes in a word; two
symbols of 12 bits leave it at least 1, and below 2**56. All end at 2**24, which is checked.
Escapes: as the symbols lie.

Source: J. Duda, asymmetric numeral systems, arXiv:1311.2540; F. Giesen, interleaved entropy coders,
arXiv:1402.3392.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numba
import numpy as np

from kvstrata.codecs import rans
from kvstrata.codecs.base import corrupt
from kvstrata.codecs.entropy_models import (
    NUM_CLASSES,
    Symbols,
    classify,
    tables,
)
from kvstrata.codecs.rans import LANES, STATE, STEP, WORD_BITS
from kvstrata.errors import UsageError
from kvstrata.layout import Bytes

__all__ = ["NUM_CLASSES", "Part", "Symbols", "bound", "classify", "decode", "encode"]

Part: TypeAlias = tuple[Symbols, Bytes]
"""Symbols (blocks, n, width), C-contiguous, and the classes of their blocks * width rows."""

_HEADER = 4 + 8 * LANES


def bound(rows: int, n: int) -> int:
    """The most bytes that a part adds to its stream, with the classes that `classify` chose.

    Those of the parts add up to the most that `encode` writes.
    """
    return _HEADER + 2 * rows * n + rows * n // 64 + 64


def encode(parts: Sequence[Part], out: Bytes) -> int:
    """Encode all parts as one stream.

    Args:
        parts: classes are from `classify`.
        out: at least as many bytes as the parts' bounds.
    Returns:
        The number of bytes written to ``out``, from its beginning.
    Raises:
        UsageError: a class does not exist or does not fit its row, or ``out`` is too short.
    """
    table = tables()
    total = sum(symbols.size for symbols, _ in parts)
    escapes, num_escapes = np.empty(total, np.int16), 0
    indexes = []
    for symbols, classes in parts:
        blocks, _, width = symbols.shape
        if len(classes) != blocks * width or (classes >= NUM_CLASSES).any():
            raise UsageError("a class for each row, please, that exists")
        index = np.empty(symbols.shape, np.uint8)
        reach = table.radius[classes].reshape(blocks, width)
        num_escapes = _index(symbols, reach, index, escapes, num_escapes)
        if num_escapes < 0:
            raise UsageError("a row of class 0 is not all zeros")
        indexes.append(index)
    # What is pushed last is popped first, so the words grow from the end of their buffer. The word
    # too many is written in front of the last one, and never kept.
    most = sum(LANES * len(classes) * -(-symbols.shape[1] // STEP) for symbols, classes in parts)
    words, word = np.empty(most + 1, np.uint32), most + 1
    states = np.full(LANES, STATE, np.int64)
    for index, (_, classes) in zip(reversed(indexes), reversed(parts), strict=True):
        word = rans.push(
            index, classes, classes.argsort(kind="stable"), table.frequency, table.start,
            table.inverse, words, word, states,
        )  # fmt: skip
    pieces = (
        np.array([num_escapes], "<u4"),
        states.astype("<u8"),
        words[word:].astype("<u4", copy=False),
        escapes[:num_escapes].astype("<i2", copy=False),
    )
    size = sum(piece.nbytes for piece in pieces)
    if size > len(out):
        raise UsageError(f"{len(out)} bytes to encode into, not {size}")
    end = 0
    for piece in pieces:
        out[end : end + piece.nbytes] = piece.view(np.uint8)
        end += piece.nbytes
    return size


def decode(data: Bytes, parts: Sequence[Part]) -> None:
    """Decode what `encode` wrote.

    Args:
        data: exactly that; checked, for it may be anything.
        parts: classes as encoded, checked too; symbols are overwritten.
    Raises:
        CorruptObject: no encoder wrote these bytes for these classes.
    """
    if len(data) < _HEADER:
        raise corrupt("shorter than the states of its symbols")
    num_escapes = int.from_bytes(data[:4].tobytes(), "little")
    num_words, rest = divmod(len(data) - _HEADER - 2 * num_escapes, 4)
    if num_words < 0 or rest:
        raise corrupt(f"{num_escapes} escapes do not fit")
    states = data[4:_HEADER].copy().view("<i8").astype(np.int64, copy=False)
    # The loops look ahead by up to LANES words.
    words = np.zeros(num_words + LANES, "<u4")
    begin = _HEADER + 4 * num_words
    words[:num_words].view(np.uint8)[:] = data[_HEADER:begin]
    escapes = data[begin:].copy().view("<i2").astype(np.int16, copy=False)
    if not all(STATE <= state < STATE << WORD_BITS for state in states.tolist()):
        raise corrupt("a state out of its range")
    decoding, word, escape = tables().decode, 0, 0
    for symbols, classes in parts:
        blocks, _, width = symbols.shape
        order = classes.argsort(kind="stable")
        if len(classes) != blocks * width or (len(order) and classes[order[-1]] >= NUM_CLASSES):
            raise corrupt("a class that does not exist")
        index = np.empty(symbols.shape, np.uint8)
        word = rans.pop(words, word, num_words, classes, order, decoding, states, index)
        if word < 0:
            raise corrupt("its symbols do not end where they should")
        escape = _symbols(index.reshape(-1), escapes, escape, symbols.reshape(-1))
        if escape < 0:
            raise corrupt("fewer escapes than its symbols ask for")
    if word != num_words or escape != num_escapes or states.tolist() != [STATE] * LANES:
        raise corrupt("its symbols do not end where they should")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _index(symbols: Symbols, reach: Symbols, index: Bytes, escapes: Symbols, escape: int) -> int:
    """Symbols + 128, or 0 for the escapes, which are gathered; -1 if a row has the wrong class.

    ``reach`` (blocks, width): the largest symbol of a row that is not an escape.
    """
    blocks, n, width = symbols.shape
    for block in range(blocks):
        largest = reach[block]
        for i in range(n):
            row, here = symbols[block, i], index[block, i]
            missing = False
            for j in range(width):
                near = (row[j] <= largest[j]) & (row[j] >= -largest[j])
                here[j] = np.uint8(row[j] + 128) if near else np.uint8(0)
                missing |= not near
            if missing:
                for j in range(width):
                    if here[j] == 0:
                        if largest[j] == 0:
                            return -1
                        escapes[escape] = row[j]
                        escape += 1
    return escape


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _symbols(index: Bytes, escapes: Symbols, escape: int, out: Symbols) -> int:
    """Undo `_index`, both flat; -1 if there are too few escapes."""
    for begin in range(0, len(index), 256):
        here, there = index[begin : begin + 256], out[begin : begin + 256]
        missing = False
        for i in range(len(here)):
            there[i] = np.int16(here[i]) - np.int16(128)
            missing |= here[i] == 0
        if missing:
            for i in range(len(here)):
                if here[i] == 0:
                    if escape == len(escapes):
                        return -1
                    there[i] = escapes[escape]
                    escape += 1
    return escape
