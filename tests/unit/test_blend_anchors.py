"""Weights of a text's KVs by what came before each: sketches of tokens, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend.anchors import NEAR_TOKENS, SKETCH_BYTES, anchor_weights, sketch
from kvstrata.errors import UsageError

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=2 * NEAR_TOKENS)


def numbers(of: list[int]) -> np.ndarray:
    return np.frombuffer(sketch(of), np.int8).astype(int)


def test_the_bytes_of_a_sketch() -> None:
    """They are stored: who writes them otherwise makes another version."""
    assert sketch([]) == bytes(SKETCH_BYTES)
    assert sketch([7]).hex() == (
        "010101ff01ff010101ff0101ffffffffff01ffff0101ffff01ffff0101ff01ff"
        "ffff01ffff01010101ffffffff0101010101ff01ffff01010101ffffff0101ff"
    )
    assert (numbers([7] * 90) == NEAR_TOKENS * numbers([7])).all()


@given(tokens, tokens)
def test_only_the_last_tokens_count_in_any_order(before: list[int], last: list[int]) -> None:
    near = [*before, *last][-NEAR_TOKENS:]
    assert sketch([*before, *last]) == sketch(near) == sketch(near[::-1])
    assert sketch(np.array(near, np.int64)) == sketch(near)
    assert np.abs(numbers(near)).max() <= len(near)


def test_sketches_are_as_far_apart_as_their_tokens() -> None:
    rng = np.random.default_rng(0)
    near = []
    for shared in (0, 16, 32, 48):
        one, other = rng.integers(0, 50_000, (2, NEAR_TOKENS))
        other[:shared] = one[:shared]
        off = np.linalg.norm(numbers(one.tolist()) - numbers(other.tolist()))
        # Of 64 random directions: the distance of counts is sqrt(2 * differing).
        wanted = np.sqrt(SKETCH_BYTES * 2 * (NEAR_TOKENS - shared))
        assert 0.7 * wanted < off < 1.3 * wanted
        near.append(off)
    assert near[0] > 1.5 * near[-1]


def test_what_is_no_token_is_refused() -> None:
    with pytest.raises(UsageError):
        sketch([-1])


def test_the_nearest_anchor_counts_most() -> None:
    here = bytes(SKETCH_BYTES)
    anchors = [bytes([high, 253 if high else 0]) + here[2:] for high in (0, 4, 8)]
    anchors[2] = bytes([250, 8]) + here[2:]  # -6 and 8
    weights = anchor_weights(here, anchors)  # at distances of 0, 5 and 10
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights / weights[0], np.exp([0, -1, -2]), rtol=1e-6)
    np.testing.assert_allclose(anchor_weights(here, [here, here]), 0.5)
    np.testing.assert_allclose(anchor_weights(here, [anchors[1]]), 1)
