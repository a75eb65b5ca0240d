"""Which objects a boundary needs: of some parts every chunk before it, of others the last ones.

A boundary is a place between two chunks, by the number of chunks before it. Full attention needs
all of these, a window those that it reaches back to, a recurrent state the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvstrata.node.common.slices import Work
from kvstrata.node.slots.slot import Row, offsets_of_rows
from kvstrata.wire.protocol import NEEDLESS

SLICE = 32
"""Objects that one slice looks for."""


class Stretch(NamedTuple):
    """Chunks next to each other of which the same parts are needed.

    Args:
        start: number of the first one.
        stop: number behind the last one.
        columns: places of those parts among all that make up a chunk.
    """

    start: int
    stop: int
    columns: tuple[int, ...]


def stretches(needs: Sequence[int], boundary: int) -> list[Stretch]:
    """All chunks before a boundary, head first.

    Args:
        needs: of each part, how many of the last chunks are needed; 0: all.
        boundary: number of chunks before it.
    """
    edges = {0, boundary, *(max(0, boundary - need) for need in needs if need)}
    return [
        Stretch(start, stop, tuple(
            column for column, need in enumerate(needs) if not need or start >= boundary - need
        ))
        for start, stop in pairwise(sorted(edges))
    ]  # fmt: skip


def longest(
    needs: Sequence[int], most: int, there: Callable[[int, int], bool], least: int = 0
) -> Work[tuple[int, int]]:
    """The longest boundary at which each part has what it needs; in slices.

    Args:
        needs: as of `stretches`. Parts that need every chunk are taken to have them.
        most: a longer one is not looked for.
        there: whether a chunk has a part, by the part's place and the chunk's number.
        least: of a boundary that is not longer nothing is asked: it is answered as it is.

    Returns:
        The boundary, and the number of the chunk for which ``most`` is none; -1: it is one.
    """
    boundary, hole, asked = most, -1, 0
    first = [most] * len(needs)  # from this chunk up to the boundary a part is there
    while boundary > least:
        lacking = -1
        for column, need in enumerate(needs):
            first[column] = min(first[column], boundary)
            while need and lacking < 0 and first[column] > max(0, boundary - need):
                asked += 1
                if asked % SLICE == 0:
                    yield None
                if there(column, first[column] - 1):
                    first[column] -= 1
                else:
                    lacking = first[column] - 1
        if lacking < 0:
            return boundary, hole
        # Every boundary between the hole and this one needs what is not there, too.
        boundary, hole = lacking, lacking if hole < 0 else hole
    return boundary, hole


def spread(
    rows: Sequence[Row],
    start: int,
    stop: int,
    shape: Sequence[Stretch],
    width: int,
    orders: frozenset[str] | None = None,
) -> bytes:
    """Offsets of chunks, of all of their parts: `NEEDLESS` for those that are not needed.

    Args:
        rows: of all chunks before the boundary, each of the parts that are needed.
        start: number of the first chunk to be told of.
        stop: number behind the last one.
        shape: the stretches of the rows.
        width: how many parts there are.
        orders: as of `offsets_of_rows`.

    Returns:
        Signed 64-bit numbers, chunk by chunk.
    """
    offsets = np.full((max(0, stop - start), width), NEEDLESS, "<i8")
    for one in shape:
        low, high = max(start, one.start), min(stop, one.stop)
        if low < high and one.columns:
            packed = offsets_of_rows(rows[low:high], orders)
            some = np.frombuffer(packed, "<i8").reshape(high - low, len(one.columns))
            offsets[low - start : high - start, list(one.columns)] = some
    return offsets.tobytes()
