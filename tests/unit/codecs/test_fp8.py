"""`fp8`: the contract, every code, rounding, the golden bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstrata.codecs.base import Payload
from kvstrata.codecs.fp8 import Fp8
from kvstrata.errors import CorruptObject
from kvstrata.testing.codecs import CodecContract, as_numbers, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"


class TestFp8(CodecContract):
    codec = Fp8()
    max_relative_error = 0.04
    min_ratio = 1.95


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def _through(numbers: np.ndarray) -> np.ndarray:
    """Numbers of one token, whose largest is 256: so the scale is 2."""
    payload = Payload((1, 1, 1, 1, len(numbers)), "float32")
    raw = numbers.astype(np.float32).view(np.uint8)
    return as_numbers(payload, decoded(Fp8(), payload, encoded(Fp8(), payload, raw))).reshape(-1)


def test_every_code_is_what_torch_says(torch: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.abs() < 256].numpy()
    assert len(numbers) > 230
    assert (_through(np.append(numbers, 255)) == np.append(numbers, 256)).all()


def test_rounding_is_to_nearest_and_halves_to_even(torch: Any) -> None:
    codes = torch.arange(0x78, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float().numpy()
    middles = (numbers[1:] + numbers[:-1]) / 2
    others = np.random.default_rng(0).normal(0, 30, 5000).astype(np.float32).clip(-255, 255)
    given = np.concatenate([middles, -middles, others, others / 1000, [255]]).astype(np.float32)
    expected = torch.tensor(given).to(torch.float8_e4m3fn).float().numpy()
    assert (_through(given) == expected).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_largest_numbers_stay_finite(dtype: str, torch: Any) -> None:
    payload = Payload((1, 2, 1, 4, 8), dtype)
    largest = torch.finfo(getattr(torch, dtype)).max
    raw = torch.full(payload.shape, largest, dtype=getattr(torch, dtype)).view(torch.uint8)
    data = encoded(Fp8(), payload, raw.numpy().reshape(-1))
    back = as_numbers(payload, decoded(Fp8(), payload, data))
    assert np.isfinite(back).all()
    assert np.allclose(back, largest, rtol=0.07)


def test_what_no_encoder_writes_is_refused() -> None:
    payload = Payload((1, 2, 1, 16, 64), "bfloat16")
    data = encoded(Fp8(), payload, kv_like(payload))
    for place, byte, match in ((5, 255, "scale"), (5 + 64, 0x7F, "NaN"), (5 + 64, 0xFF, "NaN")):
        bad = data.copy()
        bad[place] = byte
        with pytest.raises(CorruptObject, match=match):
            decoded(Fp8(), payload, bad)


def test_the_golden_bytes() -> None:
    payload = Payload((1, 2, 1, 16, 32), "bfloat16")
    golden = bytes.fromhex((GOLDEN / "fp8.hex").read_text())
    assert encoded(Fp8(), payload, kv_like(payload)).tobytes() == golden
    back = decoded(Fp8(), payload, np.frombuffer(golden, np.uint8))
    assert hashlib.sha256(back.tobytes()).hexdigest()[:16] == "ed76e6f89bd11caa"
