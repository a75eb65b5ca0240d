"""Turned keys: what rotary embedding at the new position gives, whatever made the table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend import turn
from kvstrata.errors import UsageError

Floats = npt.NDArray[np.float32]


def table(rotary: int, positions: range, factor: float = 1.0) -> Floats:
    """An engine's rows: cosines, sines; ``factor`` is YaRN's, of lengths."""
    frequencies = 10000.0 ** -(np.arange(0, rotary, 2) / rotary)
    turns = np.array(positions)[:, None] * frequencies
    return np.concatenate([np.cos(turns) * factor, np.sin(turns) * factor], 1).astype(np.float32)


def embedded(keys: Floats, rows: Floats, *, interleaved: bool) -> Floats:
    """Rotary embedding as its paper has it: each pair is a complex number that is multiplied."""
    rotary = rows.shape[1]
    half, out = rotary // 2, keys.astype(np.float64)
    turns = rows[:, :half].astype(np.float64) + 1j * rows[:, half:]
    pairs = keys[..., :rotary].astype(np.float64)
    if interleaved:
        pairs = pairs.reshape(*keys.shape[:-1], half, 2)
    else:
        pairs = np.stack([pairs[..., :half], pairs[..., half:]], -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
    both = np.stack([turned.real, turned.imag], -1)
    out[..., :rotary] = (
        both.reshape(*keys.shape[:-1], rotary)
        if interleaved
        else np.concatenate([both[..., 0], both[..., 1]], -1)
    )
    return out.astype(np.float32)


@given(
    st.sampled_from([(8, 8), (16, 8), (64, 64), (64, 32)]),
    st.booleans(),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 8000),
    st.integers(0, 8000),
    st.integers(1, 9),
)
def test_turned_is_what_the_engine_writes_at_the_new_position(
    dims: tuple[int, int], interleaved: bool, factor: float, was: int, now: int, count: int
) -> None:
    dim, rotary = dims
    plain = np.random.default_rng(was).standard_normal((2, count, dim), np.float32)
    before = table(rotary, range(was, was + count), factor)
    after = table(rotary, range(now, now + count), factor)
    keys = embedded(plain, before, interleaved=interleaved)
    turn(keys, before, after, interleaved=interleaved)
    np.testing.assert_allclose(
        keys, embedded(plain, after, interleaved=interleaved), rtol=0, atol=2e-5
    )
    assert (keys[..., rotary:] == plain[..., rotary:]).all()


def test_a_view_of_a_larger_array_is_turned_where_it_lies() -> None:
    layers = np.ones((3, 2, 4, 5, 8), np.float32)
    rows = [table(8, range(at, at + 5)) for at in (0, 9)]
    turn(layers[:, 0], *rows)
    assert (layers[:, 1] == 1).all()
    assert not (layers[:, 0] == 1).all()
    assert (layers[0, 0] == layers[2, 0]).all()


def test_tensors_are_turned_as_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    keys = np.random.default_rng(0).standard_normal((4, 5, 16), np.float32)
    rows = [table(8, range(at, at + 5)) for at in (100, 3)]
    for interleaved in (False, True):
        as_array, as_tensor = keys.copy(), torch.tensor(keys)
        turn(as_array, *rows, interleaved=interleaved)
        turn(as_tensor, *map(torch.tensor, rows), interleaved=interleaved)
        np.testing.assert_allclose(as_tensor.numpy(), as_array, rtol=0, atol=1e-6)
        assert not (as_array == keys).all()


@pytest.mark.parametrize(
    ("shape", "was", "now"),
    [
        ((2, 5, 8), (5, 8), (4, 8)),
        ((2, 5, 8), (4, 8), (4, 8)),
        ((2, 5, 8), (5, 16), (5, 16)),
        ((2, 5, 8), (5, 7), (5, 7)),
        ((8,), (1, 8), (1, 8)),
        ((2, 5, 8), (8,), (8,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], was: tuple[int, ...], now: tuple[int, ...]
) -> None:
    keys = np.ones(shape, np.float32)
    with pytest.raises(UsageError):
        turn(keys, np.ones(was, np.float32), np.ones(now, np.float32))
    assert (keys == 1).all()


def test_narrower_numbers_are_refused() -> None:
    rows = np.ones((5, 8), np.float32)
    with pytest.raises(UsageError):
        turn(np.ones((5, 8), np.float16), rows, rows)
    with pytest.raises(UsageError):
        turn(np.ones((5, 8), np.float32), rows.astype(np.float16), rows)
