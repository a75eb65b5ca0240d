"""`int8`, `int4`, `int2`: the contract at every width, ranges, sinks, the golden bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from kvstrata.codecs.base import Payload
from kvstrata.codecs.packing import pack, row_bytes, unpack
from kvstrata.codecs.quantized import INTEGERS, Quantized
from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.layout import Bytes
from kvstrata.testing.codecs import CHUNK, CodecContract, as_numbers, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"

INT8, INT4, INT2 = INTEGERS
KIVI2 = Quantized(bits=2, key_group=32, value_group=32, sinks=0, fit=False)


class TestInt8(CodecContract):
    codec = INT8
    max_relative_error = 0.02
    min_ratio = 1.8


class TestInt4(CodecContract):
    codec = INT4
    max_relative_error = 0.2
    min_ratio = 3.2


class TestInt2(CodecContract):
    codec = INT2
    max_relative_error = 0.5
    min_ratio = 4.9


class TestKivi2(CodecContract):
    codec = KIVI2
    max_relative_error = 0.7  # the sink stretches its group's range
    min_ratio = 5.3


def _error(codec: Quantized, payload: Payload, raw: Bytes) -> np.ndarray:
    there = as_numbers(payload, raw)
    return as_numbers(payload, decoded(codec, payload, encoded(codec, payload, raw))) - there


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("width", "block"), [(64, 64), (64, 32), (80, 64), (13, 13), (37, 5)])
def test_packing_and_back(bits: int, width: int, block: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 2**bits, (9, width)).astype(np.uint8)
    packed = np.full((9, row_bytes(width, block, bits)), 0xA5, np.uint8)
    pack(symbols, block, bits, 0, packed)
    back = np.zeros_like(symbols)
    unpack(packed, block, bits, 0, back)
    assert (back == symbols).all()


@pytest.mark.parametrize("width", [128, 37])
def test_symbols_of_five_bits_are_packed_in_two_planes(width: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 32, (9, width)).astype(np.uint8)
    back = np.full_like(symbols, 0xFF)
    for bits, lowest in ((4, 0), (1, 4)):
        packed = np.full((9, row_bytes(width, width, bits)), 0xA5, np.uint8)
        pack(symbols, width, bits, lowest, packed)
        unpack(packed, width, bits, lowest, back)
    assert (back == symbols).all()


def test_symbols_are_packed_densely() -> None:
    assert [row_bytes(64, 64, bits) for bits in (8, 4, 2)] == [64, 32, 16]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_number_is_off_by_half_a_step_at_most(bits: int) -> None:
    codec = Quantized(bits, key_group=32, value_group=16, sinks=0, fit=False)
    raw = kv_like(CHUNK)
    numbers, error = as_numbers(CHUNK, raw), np.abs(_error(codec, CHUNK, raw))
    keys = numbers[:, 0].reshape(2, 3, 4, 32, 64)
    step = np.ptp(keys, axis=3) / (2**bits - 1)
    slack = np.abs(keys).max(axis=3) * 2.0**-7 + step * 0.51
    assert (error[:, 0].reshape(keys.shape).max(axis=3) <= slack).all()
    values = numbers[:, 1].reshape(2, 3, 128, 4, 16)
    step = np.ptp(values, axis=4) / (2**bits - 1)
    slack = np.abs(values).max(axis=4) * 2.0**-7 + step * 0.51
    assert (error[:, 1].reshape(values.shape).max(axis=4) <= slack).all()


def test_a_key_channel_that_stands_out_does_not_spoil_the_others() -> None:
    payload = Payload((1, 2, 1, 128, 64), "float32", start=128)
    numbers = np.random.default_rng(0).normal(0, 1, payload.shape).astype(np.float32)
    numbers[..., 7] = 1000 + numbers[..., 7]
    error = np.abs(_error(INT4, payload, numbers.view(np.uint8).reshape(-1)))
    others = np.arange(64) != 7
    assert error[0, 0][..., others].max() < 0.3
    assert error[0, 1][..., others].max() > 0.3, "values have no channels of their own"


def test_a_fitted_range_has_less_error() -> None:
    payload = Payload((1, 2, 2, 128, 64), "bfloat16", start=128)
    raw = kv_like(payload)
    fitted = (_error(Quantized(2, 32, 32, 0, True), payload, raw) ** 2).mean(axis=(0, 2, 3, 4))
    plain = (_error(KIVI2, payload, raw) ** 2).mean(axis=(0, 2, 3, 4))
    assert (fitted < 0.8 * plain).all()


@pytest.mark.parametrize(("start", "exact"), [(0, 4), (3, 1), (4, 0), (128, 0)])
def test_the_first_tokens_of_a_prompt_stay_exact(start: int, exact: int) -> None:
    payload = Payload((2, 2, 3, 32, 64), "bfloat16", start)
    error = _error(INT2, payload, kv_like(payload, seed=1))
    assert (error[..., :exact, :] == 0).all()
    assert (error[..., exact : exact + 1, :] != 0).any()


@pytest.mark.parametrize("codec", [INT8, INT2])
def test_the_largest_numbers_stay_finite(codec: Quantized) -> None:
    payload = Payload((1, 2, 1, 32, 64), "float32", start=128)
    numbers = np.random.default_rng(0).choice([-1, 1], payload.shape).astype(np.float32)
    raw = (numbers * np.finfo(np.float32).max).view(np.uint8).reshape(-1)
    error = _error(codec, payload, raw)
    assert np.isfinite(error).all()
    assert (np.abs(error) <= 1e-3 * np.finfo(np.float32).max).all()


def test_ranges_that_are_not_finite_are_refused() -> None:
    payload = Payload((1, 2, 1, 16, 64), "bfloat16", start=128)
    data = encoded(INT4, payload, kv_like(payload))
    for place, byte in ((5, 255), (7, 0x7C)):
        bad = data.copy()
        bad[place] = byte
        with pytest.raises(CorruptObject, match="finite"):
            decoded(INT4, payload, bad)


def test_parameters_out_of_their_limits() -> None:
    for wrong in ((3, 32, 32, 0), (4, 0, 32, 0), (4, 32, 1 << 16, 0), (4, 32, 32, 256)):
        with pytest.raises(UsageError):
            Quantized(*wrong, fit=False)
    with pytest.raises(Incompatible):
        Quantized.from_parameters(bytes([1, 3, 4, 0, 32, 0, 32, 0]))


@pytest.mark.parametrize(
    ("codec", "digest"),
    [(INT8, "d81304fb3d83a121"), (INT4, "b58c738ee9d59453"), (INT2, "3f31fdffcadfba18")],
)
def test_the_golden_bytes(codec: Quantized, digest: str) -> None:
    payload = Payload((1, 2, 1, 16, 32), "bfloat16")
    golden = bytes.fromhex((GOLDEN / f"{codec.name}.hex").read_text())
    assert encoded(codec, payload, kv_like(payload)).tobytes() == golden
    back = decoded(codec, payload, np.frombuffer(golden, np.uint8))
    assert hashlib.sha256(back.tobytes()).hexdigest()[:16] == digest
