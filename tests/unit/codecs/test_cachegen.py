"""`cachegen-1` to `cachegen-5`: the contract, what stays exact, frames that lie."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from kvstrata.codecs import codec_named
from kvstrata.codecs.base import Payload
from kvstrata.codecs.cachegen import BINS, VERSION, CacheGen
from kvstrata.errors import CorruptObject, Incompatible
from kvstrata.layout import Elements
from kvstrata.testing.codecs import CHUNK, CodecContract, as_numbers, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"


class TestCacheGen1(CodecContract):
    codec = CacheGen(1)
    max_relative_error = 0.06
    min_ratio = 2.8


class TestCacheGen2(CodecContract):
    codec = CacheGen(2)
    max_relative_error = 0.12
    min_ratio = 3.5


class TestCacheGen3(CodecContract):
    codec = CacheGen(3)
    max_relative_error = 0.24
    min_ratio = 4.5


class TestCacheGen4(CodecContract):
    codec = CacheGen(4)
    max_relative_error = 0.36
    min_ratio = 5.5


class TestCacheGen5(CodecContract):
    codec = CacheGen(5)
    max_relative_error = 0.48
    min_ratio = 6.5


def test_every_level_has_a_name() -> None:
    for level in range(1, len(BINS) + 1):
        assert codec_named(f"cachegen-{level}") == CacheGen(level)
    for level in (0, len(BINS) + 1):
        with pytest.raises(Incompatible, match="level"):
            CacheGen.from_parameters(bytes([VERSION, level]))


def test_levels_trade_bytes_for_errors() -> None:
    raw = kv_like(CHUNK)
    numbers = as_numbers(CHUNK, raw)
    sizes, errors = [], []
    for level in range(1, len(BINS) + 1):
        data = encoded(CacheGen(level), CHUNK, raw)
        sizes.append(len(data))
        back = as_numbers(CHUNK, decoded(CacheGen(level), CHUNK, data))
        errors.append(float(((back - numbers) ** 2).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 128])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 128])
def test_the_first_four_tokens_of_a_prompt_stay_exact(start: int, tokens: int) -> None:
    payload = Payload((2, 2, 2, tokens, 16), "bfloat16", start)
    raw = kv_like(payload)
    back = decoded(CacheGen(5), payload, encoded(CacheGen(5), payload, raw))
    same = (raw == back).reshape(*payload.shape[:3], tokens, -1)
    assert same[:, :, :, : max(0, 4 - start)].all()


def test_the_first_layers_are_finer() -> None:
    payload = Payload((9, 2, 1, 64, 32), "float32", start=64)
    one = kv_like(Payload((1, 2, 1, 64, 32), "float32", start=64))
    raw = np.tile(one, 9)
    back = as_numbers(payload, decoded(CacheGen(3), payload, encoded(CacheGen(3), payload, raw)))
    errors = ((back - as_numbers(payload, raw)) ** 2).mean(axis=(1, 2, 3, 4))
    assert errors[:3].max() < errors[3:6].min()
    assert errors[3:6].max() < errors[6:].min()


def test_no_number_is_off_by_more_than_half_a_bin() -> None:
    payload = Payload((1, 2, 3, 128, 64), "float32", start=128)
    raw = kv_like(payload)
    data = encoded(CacheGen(3), payload, raw)
    widths = data[5:13].copy().view("<f4")  # behind the length of the layer and its first byte
    off = np.abs(
        as_numbers(payload, decoded(CacheGen(3), payload, data)) - as_numbers(payload, raw)
    )
    assert (off.max(axis=(0, 2, 3, 4)) <= widths * 0.5001).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_largest_numbers_stay_finite(dtype: str) -> None:
    payload = Payload((1, 2, 1, 32, 16), dtype, start=128)
    signs = np.where(np.random.default_rng(0).random(payload.layer_elements) < 0.5, 1, -1)
    words: dict[str, Elements] = {
        "bfloat16": np.where(signs > 0, 0x7F7F, 0xFF7F).astype(np.uint16),
        "float16": np.where(signs > 0, 0x7BFF, 0xFBFF).astype(np.uint16),
        "float32": np.where(signs > 0, 0x7F7FFFFF, 0xFF7FFFFF).astype(np.uint32),
    }
    raw = words[dtype].view(np.uint8)
    for level in (1, 5):
        codec = CacheGen(level)
        back = as_numbers(payload, decoded(codec, payload, encoded(codec, payload, raw)))
        assert np.isfinite(back).all()
        assert (np.sign(back).reshape(-1) == signs).all()


def test_one_number_far_out() -> None:
    payload = Payload((1, 2, 1, 64, 32), "float32", start=64)
    raw = kv_like(payload)
    raw.view(np.float32)[1000] = 1e30
    back = as_numbers(payload, decoded(CacheGen(2), payload, encoded(CacheGen(2), payload, raw)))
    assert back.reshape(-1)[1000] == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (5, struct.pack("<f", float("nan")), "width"),
        (5, struct.pack("<f", -1.0), "width"),
        (9, struct.pack("<f", float("inf")), "width"),
        (13, bytes([29, 29]), "class"),
        (15, bytes([29]), "class"),
        (15, bytes([5 << 5]), "token before"),
        (15 + 64, struct.pack("<I", 1 << 31), "escapes"),
        (19 + 64, bytes(8), "state"),
    ],
)
def test_a_frame_that_lies(at: int, value: bytes, message: str) -> None:
    payload = Payload((1, 2, 1, 16, 32), "bfloat16", start=16)
    data = encoded(CacheGen(3), payload, kv_like(payload))
    data[at : at + len(value)] = np.frombuffer(value, np.uint8)
    with pytest.raises(CorruptObject, match=message):
        decoded(CacheGen(3), payload, data)


@pytest.mark.parametrize("level", [1, 3, 5])
def test_the_golden_bytes(level: int) -> None:
    payload = Payload((1, 2, 1, 16, 32), "bfloat16")
    golden = bytes.fromhex((GOLDEN / f"cachegen-{level}.hex").read_text())
    data = np.frombuffer(golden, np.uint8)
    assert encoded(CacheGen(level), payload, kv_like(payload)).tobytes() == golden
    digest = hashlib.sha256(decoded(CacheGen(level), payload, data).tobytes()).hexdigest()
    assert (
        digest[:16] == {1: "1c9ed1b7ae232a21", 3: "34a29e00002ee020", 5: "7d60b88ccec606fe"}[level]
    )
