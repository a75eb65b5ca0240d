"""`rotated`: the contract at every level, the rotation, the levels, the golden bytes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from kvstrata.codecs.base import Payload
from kvstrata.codecs.rotated import Rotated
from kvstrata.codecs.rotation import levels_of, quantise, restore, rotate, signs
from kvstrata.errors import CorruptObject, Incompatible, LayoutMismatch, UsageError
from kvstrata.testing.codecs import CHUNK, CodecContract, as_numbers, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"


class RotatedContract(CodecContract):
    @pytest.mark.parametrize("number", [0.0, -0.0, 1e-38, 3e38, -1.0])
    def test_a_constant_layer(self, number: float) -> None:
        """A rotation bounds the error of a token, not of each number."""
        payload = Payload((1, 2, 2, 32, 64), "float32")
        raw = np.full(payload.layer_elements, number, np.float32).view(np.uint8)
        back = decoded(self.codec, payload, encoded(self.codec, payload, raw))
        numbers = as_numbers(payload, back).astype(np.float64)
        assert np.isfinite(numbers).all()
        error = ((numbers - number) ** 2).mean(axis=-1) ** 0.5
        assert (error <= self.max_relative_error * abs(number) + 1e-37).all()


class TestTurbo55(RotatedContract):
    codec = Rotated(5, 5)
    max_relative_error = 0.08
    min_ratio = 2.75


class TestTurbo54(RotatedContract):
    codec = Rotated(5, 4)
    max_relative_error = 0.13
    min_ratio = 3.0


class TestTurbo43(RotatedContract):
    codec = Rotated(4, 3)
    max_relative_error = 0.25
    min_ratio = 3.7


class TestTurbo22(RotatedContract):
    codec = Rotated(2, 2)
    max_relative_error = 0.5
    min_ratio = 5.6


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_are_those_of_lloyd_and_max(bits: int) -> None:
    levels = levels_of(bits).astype(float)
    assert len(levels) == 2**bits
    assert (levels == -levels[::-1]).all()
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
        mass = (math.erf(high / 2**0.5) - math.erf(low / 2**0.5)) / 2
        assert level == pytest.approx(density / math.sqrt(2 * math.pi) / mass, abs=1e-6)


@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128])
def test_a_rotation_keeps_lengths(dim: int) -> None:
    rng = np.random.default_rng(dim)
    numbers = rng.normal(0, 1, (2, 20, dim)).astype(np.float32)
    tile = np.empty((2, dim, 16), np.float32)
    rotate(numbers, 4, np.float32(1), signs(dim), tile)
    before, after = (numbers[:, 4:] ** 2).sum(axis=2), (tile**2).sum(axis=1)
    growth = after / before
    assert np.allclose(growth, growth[0, 0], rtol=1e-5)
    assert growth[0, 0] in (pytest.approx(1, rel=1e-5), pytest.approx(0.5, rel=1e-5))


def test_one_large_channel_is_spread_over_all() -> None:
    numbers = np.zeros((1, 8, 64), np.float32)
    numbers[..., 5] = 8
    tile = np.empty((1, 64, 8), np.float32)
    rotate(numbers, 0, np.float32(1), signs(64), tile)
    assert (np.abs(tile) == 1).all()


@pytest.mark.parametrize("centre", [False, True])
def test_the_projection_on_the_exact_numbers_is_kept(centre: bool) -> None:
    numbers = np.random.default_rng(0).normal(0, 1, (3, 128, 64)).astype(np.float32)
    tile = np.empty((3, 64, 128), np.float32)
    rotate(numbers, 0, np.float32(1), signs(64), tile)
    symbols = np.empty(tile.shape, np.uint8)
    halves = quantise(tile, centre, levels_of(2), symbols)
    means, scales = (half.astype(np.float32) for half in halves)
    back = np.empty_like(numbers)
    one, limit = np.float32(1), np.float32(1e30)
    restore(symbols, means, scales, levels_of(2), one, signs(64), limit, 0, back)
    kept = (back * numbers).sum(axis=2) / (numbers**2).sum(axis=2)
    assert np.abs(kept - 1).mean() < (0.02 if centre else 0.002)


def test_the_first_tokens_of_a_prompt_stay_exact() -> None:
    raw = kv_like(CHUNK)
    exact = as_numbers(CHUNK, raw)
    back = as_numbers(CHUNK, decoded(Rotated(2, 2), CHUNK, encoded(Rotated(2, 2), CHUNK, raw)))
    assert (back[..., :4, :] == exact[..., :4, :]).all()
    assert (back[..., 4:8, :] != exact[..., 4:8, :]).any()


def test_more_tokens_than_a_group_has() -> None:
    payload = Payload((1, 2, 1, 300, 64), "float16", start=2)
    raw = kv_like(payload)
    back = decoded(Rotated(4, 4), payload, encoded(Rotated(4, 4), payload, raw))
    there, here = as_numbers(payload, raw), as_numbers(payload, back)
    assert (there[..., :2, :] == here[..., :2, :]).all()
    error = ((here - there) ** 2).sum(axis=-1) ** 0.5
    assert (error <= 0.3 * (there**2).sum(axis=-1) ** 0.5).all()


def test_a_head_dim_that_no_transform_fits() -> None:
    with pytest.raises(LayoutMismatch, match="multiples of 8"):
        Rotated(4, 4).check(Payload((1, 2, 1, 8, 60), "bfloat16"))


def test_bits_that_are_not_offered() -> None:
    with pytest.raises(UsageError):
        Rotated(6, 2)
    with pytest.raises(Incompatible):
        Rotated.from_parameters(b"\x01\x06\x02")


def test_scales_that_are_not_finite_are_refused() -> None:
    payload = Payload((1, 2, 1, 16, 64), "bfloat16", start=128)
    data = encoded(Rotated(2, 2), payload, kv_like(payload))
    bad = data.copy()
    bad[6:134] = np.full(64, np.inf, np.float16).view(np.uint8)
    with pytest.raises(CorruptObject, match="finite"):
        decoded(Rotated(2, 2), payload, bad)
    bad = data.copy()
    bad[5] = 255
    with pytest.raises(CorruptObject, match="finite"):
        decoded(Rotated(2, 2), payload, bad)


@pytest.mark.parametrize(
    ("bits", "digest"),
    [
        ((5, 5), "7a7e097c44e6f72a"),
        ((5, 4), "43c80c7650820453"),
        ((4, 3), "5f2cf0222265c9da"),
        ((2, 2), "7bedc9348be5962a"),
    ],
)
def test_the_golden_bytes(bits: tuple[int, int], digest: str) -> None:
    payload = Payload((1, 2, 1, 16, 32), "bfloat16")
    codec = Rotated(*bits)
    golden = bytes.fromhex((GOLDEN / f"{codec.name}.hex").read_text())
    assert encoded(codec, payload, kv_like(payload)).tobytes() == golden
    back = decoded(codec, payload, np.frombuffer(golden, np.uint8))
    assert hashlib.sha256(back.tobytes()).hexdigest()[:16] == digest
