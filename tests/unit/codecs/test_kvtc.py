"""`kvtc`: the contract with calibrations fitted to its numbers, the transform, frames that lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kvstrata.codecs import calibration as artefacts
from kvstrata.codecs import codec_named, rope, stored_codec
from kvstrata.codecs.base import Codec, Payload
from kvstrata.codecs.calibration import Calibration, Header
from kvstrata.codecs.kvtc import VERSION, Kvtc
from kvstrata.codecs.kvtc_fit import LEVELS, Fit
from kvstrata.errors import CorruptObject, Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import Bytes, Elements
from kvstrata.testing.codecs import CHUNK, CodecContract, as_numbers, decoded, encoded, kv_like

GOLDEN = Path(__file__).parents[2] / "golden" / "codecs"


@cache
def fitted(layers: int, heads: int, dim: int) -> Calibration:
    """Of the contract's numbers, which draw other channels with each seed."""
    frequencies = np.tile(1e4 ** -(np.arange(dim // 2) * 2 / dim), (layers, 1))
    fit = Fit("kv-like", frequencies, heads)
    for seed in range(4):
        payload = Payload((layers, 2, heads, 128, dim), "float32", 128)
        numbers = as_numbers(payload, kv_like(payload, seed))
        fit.add(numbers, [np.full(numbers.shape, 0.01, np.float32)], 128)
    calibration = fit.finish()
    artefacts.register(calibration)
    return calibration


@dataclass(frozen=True)
class Fitted(Codec):
    """For any shape the `Kvtc` of its own calibration: the contract has many shapes."""

    level: int

    family = Kvtc.family

    def of(self, payload: Payload) -> Kvtc:
        layers, states, heads, _, dim = payload.shape
        if states != 2:
            raise LayoutMismatch("kvtc has no latents")
        return Kvtc(self.level, fitted(layers, heads, dim))

    @property
    def name(self) -> str:
        return self.of(CHUNK).name

    def parameters(self) -> bytes:
        return self.of(CHUNK).parameters()

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Fitted:
        return cls(Kvtc.from_parameters(parameters).level)

    def check(self, payload: Payload) -> None:
        self.of(payload).check(payload)

    def layer_bound(self, payload: Payload) -> int:
        return self.of(payload).layer_bound(payload)

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        return self.of(payload).encode_layer(values, layer, payload, out)

    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        self.of(payload).decode_layer(frame, layer, payload, out)


class KvtcContract(CodecContract):
    """The contract, but for one thing: steps are absolute, made for the numbers of one model."""

    codec: ClassVar[Fitted]

    @pytest.mark.parametrize("number", [0.0, -0.0, 1e-38, 3e38, -1.0])
    def test_a_constant_layer(self, number: float) -> None:
        payload = Payload((1, 2, 2, 32, 64), "float32")
        raw = np.full(payload.layer_elements, number, np.float32).view(np.uint8)
        back = as_numbers(payload, decoded(self.codec, payload, encoded(self.codec, payload, raw)))
        calibration = self.codec.of(payload).calibration
        step = calibration.header.steps[str(self.codec.level)] / calibration.weight.min()
        assert np.abs(back - number).max() <= (4 * step if abs(number) == 1 else 1e-37)


class TestKvtc2(KvtcContract):
    codec = Fitted(4)
    max_relative_error = 0.5
    min_ratio = 4.5


class TestKvtc4(KvtcContract):
    codec = Fitted(8)
    max_relative_error = 0.15
    min_ratio = 3


class TestKvtc5_5(KvtcContract):
    codec = Fitted(11)
    max_relative_error = 0.06
    min_ratio = 2.3


def low_rank(payload: Payload, seed: int = 0) -> Bytes:
    """Keys and values that lie near a plane of 6 dimensions, with keys then turned."""
    rng = np.random.default_rng(0)
    layers, states, heads, count, dim = payload.shape
    plane = rng.normal(0, 1, (layers, states, 6, heads * dim))
    rng = np.random.default_rng(seed + 1)
    numbers = rng.normal(0, 1, (layers, states, count, 6)) @ plane
    numbers += rng.normal(0, 0.01, numbers.shape)
    tokens = numbers.astype(np.float32).reshape(layers, states, count, heads, dim)
    out = np.ascontiguousarray(tokens.swapaxes(2, 3))
    frequencies = (1e4 ** -(np.arange(dim // 2) * 2 / dim)).tobytes()
    angles = rope.angles(frequencies, payload.start, count)
    for layer in range(layers):
        rope.rotate(tokens[layer, 0].copy(), angles.cos, angles.sin, 1e30, out[layer, 0])
    return out.reshape(-1).view(np.uint8)


def plane_codec() -> Kvtc:
    frequencies = np.tile(1e4 ** -(np.arange(16) * 2 / 32), (1, 1))
    fit = Fit("plane", frequencies, 2)
    for seed in range(4):
        payload = Payload((1, 2, 2, 128, 32), "float32", 128 * seed)
        numbers = as_numbers(payload, low_rank(payload, seed))
        fit.add(numbers, [np.ones_like(numbers)], 128 * seed)
    calibration = fit.finish()
    artefacts.register(calibration)
    return Kvtc(2, calibration)


@pytest.mark.parametrize("start", [128, 8192, 1 << 20])
def test_it_finds_the_components_wherever_the_keys_were_turned_to(start: int) -> None:
    codec, payload = plane_codec(), Payload((1, 2, 2, 128, 32), "float32", start)
    raw = low_rank(payload, 99)
    data = encoded(codec, payload, raw)
    there, here = as_numbers(payload, raw), as_numbers(payload, decoded(codec, payload, data))
    error = ((here - there) ** 2).mean((2, 3, 4)) / (there**2).mean((2, 3, 4))
    assert (error**0.5 < 0.02).all(), error
    # 58 of 64 components are noise: that is what a bit an element is enough for.
    assert payload.nbytes / len(data) > 20
    # A wrong position spoils the keys, and them alone.
    wrong = as_numbers(payload, decoded(codec, Payload(payload.shape, "float32", start + 9), data))
    error = ((wrong - there) ** 2).mean((2, 3, 4)) / (there**2).mean((2, 3, 4))
    assert error[0, 0] > 0.1
    assert error[0, 1] < 0.001


def test_sinks_stay_exact_where_the_prompt_begins() -> None:
    for start, exact in ((0, 4), (2, 2), (4, 0)):
        payload = Payload(CHUNK.shape, "bfloat16", start)
        raw = kv_like(payload)
        codec = Fitted(4)
        same = as_numbers(payload, raw) == as_numbers(
            payload, decoded(codec, payload, encoded(codec, payload, raw))
        )
        assert same[:, :, :, :exact].all()
        assert not same[:, :, :, exact].all()


def test_levels_spend_what_they_are_named_for() -> None:
    payload = Payload(CHUNK.shape, "bfloat16", 128)
    for level in LEVELS:
        sizes = [len(encoded(Fitted(level), payload, kv_like(payload, seed))) for seed in range(4)]
        bits = 8 * sum(sizes) / 4 / (payload.nbytes / 2)
        assert bits == pytest.approx(level / 2, rel=0.25)


def test_numbers_that_the_calibration_does_not_know_stay_exact() -> None:
    payload = Payload(CHUNK.shape, "bfloat16", 128)
    for scale in (1e-6, 1e12):
        numbers = as_numbers(payload, kv_like(payload)) * np.float32(scale)
        raw = (numbers.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        data = encoded(Fitted(4), payload, raw)
        assert (decoded(Fitted(4), payload, data) == raw).all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 2, 3, 128, 64), "bfloat16"),
        ((2, 1, 3, 128, 64), "bfloat16"),
        ((2, 2, 2, 128, 64), "bfloat16"),
        ((2, 2, 3, 128, 32), "bfloat16"),
        ((2, 2, 3, 128, 64), "float8_e4m3fn"),
    ],
)
def test_another_shape_is_refused(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    with pytest.raises(LayoutMismatch):
        Kvtc(4, fitted(2, 3, 64)).check(Payload(shape, dtype))


@pytest.mark.parametrize(
    "frame",
    [b"", b"\1", b"\1\0", b"\1\1" + bytes(5), b"\1\2" + bytes(20000), b"\1\0" + b"\xff" * 900],
)
def test_frames_that_lie(frame: bytes) -> None:
    payload = Payload((2, 2, 3, 16, 64), "bfloat16", 128)
    out = np.empty(payload.layer_shape, np.uint16)
    with pytest.raises(CorruptObject):
        Fitted(4).decode_layer(np.frombuffer(frame, np.uint8), 0, payload, out)


def golden_codec() -> Kvtc:
    """Made of exact numbers, so that every machine makes the same: a Hadamard matrix, 2 ** -i."""
    matrix = np.ones((1, 1))
    for _ in range(5):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    basis = np.broadcast_to(matrix / 32**0.5, (1, 2, 1, 32, 32)).astype(np.float16)
    calibration = Calibration(
        Header("golden", 1, 1, 32, 1, 1000, {"4": 0.5}),
        2.0 ** -np.arange(16, dtype=np.float64)[None],
        np.full((1, 2, 32), 0.25, np.float32),
        np.full((1, 2, 32), 2.0, np.float32),
        basis,
    )
    artefacts.register(calibration)
    return Kvtc(4, calibration)


def test_the_golden_bytes() -> None:
    codec, payload = golden_codec(), Payload((1, 2, 1, 16, 32), "bfloat16")
    assert codec.calibration.fingerprint.hex() == "4fbdd2e81ce3145d08e7e6634f238755"
    golden = bytes.fromhex((GOLDEN / "kvtc.hex").read_text())
    assert encoded(codec, payload, kv_like(payload)).tobytes() == golden
    back = decoded(codec, payload, np.frombuffer(golden, np.uint8))
    assert hashlib.sha256(back.tobytes()).hexdigest()[:16] == "7aa2e9f44c7ad067"


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="kvstrata calibrate MODEL"):
        codec_named("kvtc-2")
    one, other = golden_codec().calibration, fitted(1, 1, 64)
    one.save(artefacts.default_path(one))
    codec = codec_named("kvtc-2")
    assert codec == Kvtc(4, one)
    assert codec_named(codec.name) == codec
    assert stored_codec("kvtc", codec.parameters()) == codec
    for wrong in ("kvtc-3", "kvtc-2.5", "kvtc-", "kvtc-nan", "kvtc-2@0g", "kvtc-2@" + "0" * 32):
        with pytest.raises(UsageError, match="kvtc"):
            codec_named(wrong)
    other.save(artefacts.default_path(other))
    with pytest.raises(UsageError, match="of golden"):
        codec_named("kvtc-2")
    assert codec_named(codec.name) == codec


def test_parameters_of_no_such_calibration_or_level() -> None:
    parameters = golden_codec().parameters()
    for wrong in (parameters[:2] + bytes(16), bytes([VERSION, 5]) + parameters[2:], b""):
        with pytest.raises(Incompatible):
            Kvtc.from_parameters(wrong)
