"""`lossless`: bit for bit, whatever the bits are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zstandard

from kvstrata.codecs.base import Payload
from kvstrata.codecs.lossless import Lossless
from kvstrata.errors import CorruptObject
from kvstrata.testing.codecs import CHUNK, CodecContract, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"


class TestLossless(CodecContract):
    codec = Lossless()
    min_ratio = 1.3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern_of_16_bits(dtype: str) -> None:
    payload = Payload((1, 1, 1, 256, 256), dtype)
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    assert (decoded(Lossless(), payload, encoded(Lossless(), payload, raw)) == raw).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_elements_of_one_byte(dtype: str) -> None:
    payload = Payload((2, 2, 1, 32, 64), dtype)
    raw = (np.arange(payload.nbytes) % 7).astype(np.uint8)
    data = encoded(Lossless(), payload, raw)
    assert len(data) < payload.nbytes / 2
    assert (decoded(Lossless(), payload, data) == raw).all()


def test_noise_costs_only_its_tables() -> None:
    raw = np.random.default_rng(0).integers(0, 256, CHUNK.nbytes).astype(np.uint8)
    data = encoded(Lossless(), CHUNK, raw)
    assert len(data) <= CHUNK.nbytes + CHUNK.num_layers * 20
    assert (decoded(Lossless(), CHUNK, data) == raw).all()


def test_the_order_of_a_native_payload_does_not_matter() -> None:
    native = Payload((2, 1, 1, 1, CHUNK.layer_elements), "bfloat16")
    raw = kv_like(CHUNK)
    assert (decoded(Lossless(), native, encoded(Lossless(), native, raw)) == raw).all()


def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_unpacked() -> None:
    payload = Payload((1, 1, 1, 1, 64), "bfloat16")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    frame = np.array([len(bomb), 64 | 1 << 31], "<u4").tobytes() + bomb + bytes(64)
    data = np.frombuffer(len(frame).to_bytes(4, "little") + frame, np.uint8)
    with pytest.raises(CorruptObject, match="another size"):
        decoded(Lossless(), payload, data)


def test_keys_and_values_have_tables_of_their_own() -> None:
    payload = Payload((1, 2, 1, 64, 64), "bfloat16")
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 16, payload.shape).astype(np.uint16)
    words[:, 0] &= 0x807F  # keys of one exponent, values of any
    raw = words.reshape(-1).view(np.uint8)
    data = encoded(Lossless(), payload, raw)
    assert len(data) < payload.nbytes * 3 / 4 + 100
    assert (decoded(Lossless(), payload, data) == raw).all()


def test_the_golden_bytes() -> None:
    """Decoding is pinned; how zstd compresses may change with its version."""
    payload = Payload((1, 2, 1, 16, 32), "bfloat16")
    golden = bytes.fromhex((GOLDEN / "lossless.hex").read_text())
    raw = decoded(Lossless(), payload, np.frombuffer(golden, np.uint8))
    assert (raw == kv_like(payload)).all()
