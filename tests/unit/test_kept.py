"""The payload of selected tokens: what is written comes back, and nothing else is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.selected import drawn, encoded

from kvstrata.errors import CorruptObject, UsageError
from kvstrata.layout import ITEM_BYTES
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept

TOKENS = 40


@pytest.mark.parametrize("rows", [0, 5, 12, 17])
@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_what_is_written_comes_back(dtype: str, rows: int) -> None:
    kept = drawn(1, dtype=dtype)
    payload = encoded(kept, rows)
    again = k.decode(payload, kept.shape(rows), dtype, TOKENS)
    assert again.equals(kept)
    assert np.array_equal(encoded(again, rows), payload)


def test_the_bytes_are_those_of_the_page() -> None:
    kept = Kept(
        np.array([[1, 2]], np.int32),
        np.array([7, 0, 300], np.int32),
        np.array([[1, 2], [3, 4], [5, 6]], np.uint16),
        np.array([[7, 8], [9, 10], [11, 12]], np.uint16),
        "bfloat16",
        301,
    )
    assert kept.shape(4) == (1, 2, 2, 4, 2)
    assert encoded(kept, 4).tobytes().hex() == (
        "0100000002000000"  # counts
        "07000000000000002c01000000000000"  # positions, and one of padding
        "01000200030004000500060000000000"  # keys
        "070008000900 0a000b000c0000000000".replace(" ", "")  # values
    )


def test_a_head_knows_its_rows() -> None:
    kept = drawn()
    heads = [kept.head(layer, head) for layer in range(2) for head in range(3)]
    assert [(one.start, one.stop) for one in heads] == [
        (0, 2), (2, 2), (2, 5), (5, 6), (6, 10), (10, 12)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positions": [3, 3, 1, 5]}, "position 3 in row 1 follows 3"),
        ({"positions": [3, 1, 5, 9]}, "position 1 in row 1 follows 3"),
        ({"positions": [-1, 3, 1, 5]}, "positions -1 to 5"),
        ({"positions": [1, 40, 1, 5]}, "positions 1 to 40"),
        ({"positions": [1, 2, 3]}, "3 positions, keys"),
        ({"counts": [[2, 1]]}, "heads keep 3 tokens, but there are 4 rows"),
        ({"counts": [[5, -1]]}, "a head keeps -1 to 5"),
        ({"counts": [2, 2]}, "counts is int32 (2,)"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": "float32"}, "keys is uint16"),
        ({"prompt_tokens": 0}, "a context of 0 tokens"),
        ({"prompt_tokens": 1 << 31}, "a context of 2147483648 tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], says: str) -> None:
    rows = np.zeros((4, 2), np.uint16)
    fields = {
        "counts": [[2, 2]], "positions": [3, 9, 1, 5], "keys": rows, "values": rows,
        "dtype": "bfloat16", "prompt_tokens": TOKENS, **changes,
    }  # fmt: skip
    for name in ("counts", "positions"):
        fields[name] = np.array(fields[name], np.int32)
    with pytest.raises(UsageError) as refused:
        Kept(**fields)
    assert says in str(refused.value)


def test_positions_may_fall_between_heads_alone() -> None:
    """Where heads keep nothing, the beginnings of others are still told from the middle."""
    counts = [[0, 2, 0], [2, 0, 0]]
    word = np.zeros((4, 2), np.uint16)

    def kept(positions: list[int]) -> Kept:
        numbers = np.array(positions, np.int32)
        return Kept(np.array(counts, np.int32), numbers, word, word, "bfloat16", TOKENS)

    assert kept([8, 9, 1, 2]).rows == 4
    for falling in ([9, 8, 1, 2], [8, 9, 2, 1]):
        with pytest.raises(UsageError, match="follows"):
            kept(falling)


def test_a_buffer_of_another_size_is_refused() -> None:
    kept = drawn()
    size = k.payload_bytes(kept.shape(), kept.dtype)
    for wrong in (size - 1, size + 1):
        with pytest.raises(UsageError, match="for a kept payload"):
            k.encode(kept, np.zeros(wrong, np.uint8))


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "says"),
    [
        ((2, 2, 3, 12, 5), "bfloat16", TOKENS, "bytes for a kept payload"),
        ((2, 2, 3, 11, 4), "bfloat16", TOKENS, "bytes for a kept payload"),
        ((2, 1, 3, 12, 4), "bfloat16", TOKENS, "not [L, 2, H, R, D]"),
        ((2, 2, 3, 12), "bfloat16", TOKENS, "not [L, 2, H, R, D]"),
        ((2, 2, 0, 12, 4), "bfloat16", TOKENS, "not [L, 2, H, R, D]"),
        ((1 << 62, 2, 1 << 62, 12, 4), "bfloat16", TOKENS, "bytes for a kept payload"),
        ((2, 2, 3, 12, 4), "complex64", TOKENS, "unknown dtype"),
        ((2, 2, 3, 12, 4), "bfloat16", 5, "of a context of 5"),
        ((2, 2, 3, 12, 4), "bfloat16", 0, "a context of 0"),
    ],
)
def test_a_header_that_does_not_fit_its_payload(
    shape: Any, dtype: str, tokens: int, says: str
) -> None:
    with pytest.raises(CorruptObject) as refused:
        k.decode(encoded(drawn()), shape, dtype, tokens)
    assert says in str(refused.value)


def test_padding_that_is_not_zero_is_refused() -> None:
    kept = drawn()
    shape, good = kept.shape(14), encoded(kept, 14)
    table, row = k.table_bytes(shape), 4 * 2
    for at in (table - 1, table + 14 * row - 1, len(good) - 1):
        bad = good.copy()
        bad[at] = 1
        with pytest.raises(CorruptObject, match="padding"):
            k.decode(bad, shape, kept.dtype, TOKENS)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_bytes_are_read_right_or_refused(data: st.DataObject) -> None:
    """Whatever is read is what `encode` would have written for it."""
    kept = drawn(data.draw(st.integers(0, 50)))
    rows = data.draw(st.integers(0, 16))
    payload, shape = encoded(kept, rows), kept.shape(rows)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    payload = payload[: len(payload) - data.draw(st.sampled_from([0, 0, 0, 1, 4, 100]))]
    try:
        again = k.decode(payload, shape, kept.dtype, TOKENS)
    except CorruptObject:
        return
    assert np.array_equal(encoded(again, rows), payload)


def test_the_digest_is_of_counts_and_positions_alone() -> None:
    kept = drawn()
    shape, payload = kept.shape(14), encoded(kept, 14)
    digest = k.positions_digest(payload, shape)
    for at in range(len(payload)):
        changed = payload.copy()
        changed[at] ^= 1
        same = k.positions_digest(changed, shape) == digest
        assert same == (at >= k.table_bytes(shape))
