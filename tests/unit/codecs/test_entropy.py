"""The entropy coder: what goes in comes out, tables that never change, hostile bytes."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.codecs.entropy import NUM_CLASSES, Symbols, bound, classify, decode, encode
from kvstrata.codecs.entropy_models import PLAIN, PROB_BITS, tables
from kvstrata.errors import CorruptObject, UsageError
from kvstrata.layout import Bytes

_settings = settings(max_examples=100, deadline=None)


def rows_like(widths: list[float], n: int = 128, seed: int = 0) -> Symbols:
    """A row of normally distributed integers for each standard deviation."""
    noise = np.random.default_rng(seed).normal(0, 1, (len(widths), n))
    rows: Symbols = np.rint(noise * np.array(widths)[:, None]).astype(np.int16)
    return rows


def block(symbols: Symbols) -> Symbols:
    """Rows (rows, n) as the coder takes them: columns of one block."""
    return np.ascontiguousarray(symbols.T)[None]


def encoded(symbols: Symbols, classes: Bytes | None = None) -> tuple[Bytes, Bytes]:
    """The stream of rows (rows, n), and the classes, with a check of the bound."""
    chosen = classify(block(symbols)) if classes is None else classes
    room = bound(*symbols.shape) * (1 if classes is None else 2)
    out = np.full(room + 64, 0xA5, np.uint8)
    size = encode([(block(symbols), chosen)], out[:room])
    assert (out[size:] == 0xA5).all()
    return out[:size].copy(), chosen


def decoded(data: Bytes, classes: Bytes, n: int) -> Symbols:
    """The rows, with a check that nothing is written around them."""
    guarded = np.full(len(classes) * n + 200, 0x5A5A, np.int16)
    out = guarded[100:-100].reshape(1, n, len(classes))
    try:
        decode(data, [(out, classes)])
    finally:
        assert (guarded[:100] == 0x5A5A).all()
        assert (guarded[-100:] == 0x5A5A).all()
    rows: Symbols = out[0].T
    return rows


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 128, 256])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_round_trip(rows: int, n: int) -> None:
    symbols = rows_like(list(np.geomspace(0.01, 20000, rows)), n)
    data, classes = encoded(symbols)
    assert (decoded(data, classes, n) == symbols).all()


def test_no_rows_at_all() -> None:
    symbols = np.empty((0, 128), np.int16)
    data, classes = encoded(symbols)
    assert decoded(data, classes, 128).shape == (0, 128)


def test_every_symbol_in_every_class() -> None:
    every = np.arange(-(1 << 15), 1 << 15).astype(np.int16).reshape(1, -1)
    for class_ in range(1, NUM_CLASSES):
        data, classes = encoded(every, np.array([class_], np.uint8))
        assert (decoded(data, classes, every.shape[1]) == every).all()


def test_parts_of_several_blocks_share_a_stream() -> None:
    shapes = [(2, 37, 1), (3, 100, 40), (1, 1, 5), (4, 16, 33)]
    rng = np.random.default_rng(3)
    parts = []
    for blocks, n, width in shapes:
        widths = rng.permutation(np.geomspace(0.05, 3000, blocks * width))
        noise = rng.normal(0, 1, (blocks, n, width)) * widths.reshape(blocks, 1, width)
        symbols = np.rint(noise).astype(np.int16)
        parts.append((symbols, classify(symbols)))
    out = np.empty(sum(bound(b * w, n) for b, n, w in shapes), np.uint8)
    data = out[: encode(parts, out)].copy()
    backs = [(np.empty_like(symbols), classes) for symbols, classes in parts]
    decode(data, backs)
    for (symbols, _), (back, _) in zip(parts, backs, strict=True):
        assert (back == symbols).all()
    with pytest.raises(CorruptObject):
        decode(data, backs[:-2])
    with pytest.raises(CorruptObject):
        decode(data, backs[::-1])


def test_a_row_is_a_column_of_its_block() -> None:
    rows = rows_like(list(np.geomspace(0.1, 60, 96)))
    whole = encoded(rows)[0]
    halves = np.stack([np.ascontiguousarray(rows[:48].T), np.ascontiguousarray(rows[48:].T)])
    assert (classify(halves) == classify(block(rows))).all()
    out = np.empty(2 * len(whole), np.uint8)
    size = encode([(halves, classify(halves))], out)
    assert out[:size].tobytes() == whole.tobytes()


def test_zeros_cost_nothing() -> None:
    symbols = np.zeros((1000, 128), np.int16)
    data, classes = encoded(symbols)
    assert not classes.any()
    assert len(data) == len(encoded(symbols[:1])[0])
    assert (decoded(data, classes, 128) == 0).all()


def test_noise_costs_16_bits_and_no_more() -> None:
    symbols = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (64, 128)).astype(np.int16)
    data, classes = encoded(symbols)
    assert (classes == PLAIN).all()
    assert len(data) <= symbols.nbytes + 68


@pytest.mark.parametrize("width", [0.2, 0.5, 1, 3, 10, 30])
def test_close_to_the_entropy(width: float) -> None:
    symbols = rows_like([width] * 400)
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy_bits = -(counts * np.log2(counts)).sum()
    bits = len(encoded(symbols)[0]) * 8 / symbols.size
    assert bits <= entropy_bits * 1.02 + 0.03


def test_the_class_is_the_best_one() -> None:
    symbols = rows_like(list(np.geomspace(0.05, 120, 60)), seed=1)
    symbols[::7, 5] = 900  # an escape must not mislead it
    for row in symbols:
        one = np.repeat(row.reshape(1, -1), 16, axis=0)  # else rounding to words decides
        sizes = [len(encoded(one, np.full(16, c, np.uint8))[0]) for c in range(1, PLAIN)]
        if one.any():
            assert len(encoded(one)[0]) <= min(sizes) + 4


def test_rows_are_coded_by_class_whatever_their_order() -> None:
    symbols = rows_like(list(np.random.default_rng(2).permutation(np.geomspace(0.1, 60, 96))))
    data, classes = encoded(symbols)
    assert len(set(classes.tolist())) > 15
    assert (decoded(data, classes, 128) == symbols).all()


def test_the_tables_are_part_of_the_format() -> None:
    table = tables()
    assert (table.frequency[1:PLAIN].sum(axis=1) == 1 << PROB_BITS).all()
    digest = hashlib.sha256(table.frequency.astype("<u2").tobytes()).hexdigest()
    assert digest == "d78618200c1037ba58a605414f9f15796e66028b3ad4b59b3cfdae0bc441f57c"


def test_the_inverses_give_the_quotient_or_one_less() -> None:
    table = tables()
    pairs = {
        (int(f), float(i))
        for f, i in zip(table.frequency.ravel(), table.inverse.ravel(), strict=True)
        if f
    }
    assert len(pairs) > 100
    rng = np.random.default_rng(0)
    for often, inverse in pairs:
        assert often * (1 << 44) <= 1 << 56
        for quotient in (1, 1 << 12, (1 << 44) - 1, *rng.integers(1, 1 << 44, 20).tolist()):
            for state in quotient * often, quotient * often + often - 1:
                assert quotient - int(float(state) * inverse) in (0, 1)


def test_what_the_caller_gets_wrong() -> None:
    symbols = rows_like([1.0, 1.0])
    out = np.empty(bound(*symbols.shape), np.uint8)
    for classes, message in (
        (np.zeros(2, np.uint8), "class 0"),
        (np.full(2, NUM_CLASSES, np.uint8), "exists"),
        (np.ones(3, np.uint8), "exists"),
    ):
        with pytest.raises(UsageError, match=message):
            encode([(block(symbols), classes)], out)
    with pytest.raises(UsageError, match="encode into"):
        encode([(block(symbols), classify(block(symbols)))], out[:70])


def test_classes_that_do_not_exist_or_are_others() -> None:
    symbols = rows_like([1.0, 5.0])
    data, classes = encoded(symbols)
    with pytest.raises(CorruptObject):
        decoded(data, np.full(2, NUM_CLASSES, np.uint8), 128)
    with pytest.raises(CorruptObject):
        decoded(data, (classes + 1).astype(np.uint8), 128)
    with pytest.raises(CorruptObject):
        decoded(data, np.full(2, PLAIN, np.uint8), 128)


def test_states_out_of_their_range() -> None:
    symbols = rows_like([1.0, 5.0])
    data, classes = encoded(symbols)
    for state in (0, (1 << 24) - 1, 1 << 56, (1 << 64) - 1):
        for lane in range(8):
            bad = data.copy()
            bad[4 + 8 * lane : 12 + 8 * lane] = np.array([state], "<u8").view(np.uint8)
            with pytest.raises(CorruptObject, match="range"):
                decoded(bad, classes, 128)


def test_a_stream_cut_or_grown_anywhere() -> None:
    symbols = rows_like([0.3, 2.0, 300.0], 48)
    data, classes = encoded(symbols)
    for size in range(len(data)):
        with pytest.raises(CorruptObject):
            decoded(data[:size], classes, 48)
    for extra in (1, 2, 40):
        with pytest.raises(CorruptObject):
            decoded(np.concatenate([data, np.zeros(extra, np.uint8)]), classes, 48)


@_settings
@given(data=st.data())
def test_hostile_bytes(data: st.DataObject) -> None:
    rows, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
    classes = np.array(data.draw(st.lists(st.integers(0, 255), min_size=rows, max_size=rows)))
    good, _ = encoded(rows_like([float(c % 40) for c in classes], n))
    seed = data.draw(st.integers(0, 2**32))
    kind = data.draw(st.sampled_from(["other classes", "flips", "noise", "noise but the head"]))
    bad = good.copy()
    if kind == "flips":
        for _ in range(data.draw(st.integers(1, 5))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind != "other classes":
        begin = 4 if kind == "noise but the head" else 0
        bad[begin:] = np.random.default_rng(seed).integers(0, 256, len(bad) - begin)
    with suppress(CorruptObject):
        decoded(bad, (classes % (NUM_CLASSES + 1)).astype(np.uint8), n)


@_settings
@given(
    width=st.floats(0.01, 40000),
    outliers=st.integers(0, 20),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 200)),
    seed=st.integers(0, 2**32),
)
def test_any_symbols(width: float, outliers: int, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = np.clip(np.rint(rng.laplace(0, width, shape)), -(1 << 15), (1 << 15) - 1)
    symbols = symbols.astype(np.int16)
    at = rng.integers(0, symbols.size, outliers)
    symbols.reshape(-1)[at] = rng.integers(-(1 << 15), 1 << 15, outliers)
    data, classes = encoded(symbols)
    assert (decoded(data, classes, shape[1]) == symbols).all()
