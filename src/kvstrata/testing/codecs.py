"""The contract every codec keeps, as a class of tests to subclass.

::

    class TestMine(CodecContract):
        codec = MyCodec(bits=4)
        max_relative_error = 0.1
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.codecs.base import Codec, Payload
from kvstrata.codecs.elements import Floats, from_float32, to_float32
from kvstrata.codecs.framing import Decoder, decode, encode, encoded_bound
from kvstrata.errors import CorruptObject, Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import WORDS, Bytes, Elements

GUARD = 4096

CHUNK = Payload((2, 2, 3, 128, 64), "bfloat16")
"""Two layers of a chunk as SmolLM2 has it."""

SHAPES = [
    (1, 2, 1, 1, 8),
    (3, 1, 1, 16, 40),
    (2, 2, 5, 48, 64),
    (1, 2, 2, 33, 80),
    (2, 2, 1, 128, 128),
]
DTYPES = ["bfloat16", "float16", "float32"]

_settings = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def kv_like(payload: Payload, seed: int = 0) -> Bytes:
    """Bytes of numbers as real KV has them: channels of different scale and mean, a sink token."""
    rng = np.random.default_rng(seed)
    layers, states, heads, _, dim = payload.shape
    scale = np.exp(rng.normal(-1, 1, (layers, states, heads, 1, dim)))
    mean = rng.normal(0, 2, scale.shape) * (rng.random(scale.shape) < 0.2)
    drift = np.cumsum(rng.normal(0, 0.2, payload.shape), axis=3)
    numbers = (rng.normal(0, 1, payload.shape) + drift) * scale + mean
    if payload.start == 0:
        numbers[..., :1, :] *= 8
    raw = np.empty(payload.nbytes, np.uint8)
    from_float32(numbers.astype(np.float32), payload.dtype, _words(payload, raw))
    return raw


def encoded(codec: Codec, payload: Payload, raw: Bytes) -> Bytes:
    """What `encode` writes, with a check that it stays within its bound."""
    bound = encoded_bound(codec, payload)
    out = np.full(bound + GUARD, 0xA5, np.uint8)
    size = encode(codec, payload, raw, out[:bound])
    assert size <= bound
    assert (out[bound:] == 0xA5).all(), "wrote behind its bound"
    return np.array(out[:size])


def decoded(codec: Codec, payload: Payload, data: Bytes) -> Bytes:
    """What `decode` gives, with a check that it writes nowhere else."""
    out = np.full(payload.nbytes + 2 * GUARD, 0x5A, np.uint8)
    try:
        decode(codec, payload, data, out[GUARD:-GUARD])
    finally:
        assert (out[:GUARD] == 0x5A).all(), "wrote before its buffer"
        assert (out[-GUARD:] == 0x5A).all(), "wrote behind its buffer"
    return np.array(out[GUARD:-GUARD])


def as_numbers(payload: Payload, raw: Bytes) -> Floats:
    """The float32 numbers of a payload, in its shape."""
    return to_float32(_words(payload, raw), payload.dtype)


def _words(payload: Payload, raw: Bytes) -> Elements:
    words: Elements = raw.view(WORDS[payload.item_bytes])
    return words.reshape(payload.shape)


class CodecContract:
    """Subclass, set ``codec``, and pytest collects the tests.

    ``max_relative_error``: of a lossy codec on `kv_like` numbers, the root of the mean squared
    error over that of the numbers, per layer and state; more than this is a bug, not the method.
    ``min_ratio``: how many times smaller `CHUNK` must become at least.
    """

    codec: ClassVar[Codec]
    max_relative_error: ClassVar[float] = 0.0
    min_ratio: ClassVar[float] = 0.99

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("start", [0, 128])
    def test_round_trip(
        self, shape: tuple[int, int, int, int, int], dtype: str, start: int
    ) -> None:
        payload = Payload(shape, dtype, start)
        try:
            self.codec.check(payload)
        except LayoutMismatch as error:
            pytest.skip(str(error))
        raw = kv_like(payload, seed=start)
        back = decoded(self.codec, payload, encoded(self.codec, payload, raw))
        if self.codec.lossless:
            assert (back == raw).all()
            return
        there, here = as_numbers(payload, raw), as_numbers(payload, back)
        assert np.isfinite(here).all()
        damage = ((here - there) ** 2).mean(axis=(2, 3, 4)) ** 0.5
        size = (there**2).mean(axis=(2, 3, 4)) ** 0.5
        assert (damage <= self.max_relative_error * size).all(), (damage / size).max()

    def test_it_makes_smaller(self) -> None:
        raw = kv_like(CHUNK)
        assert CHUNK.nbytes / len(encoded(self.codec, CHUNK, raw)) >= self.min_ratio

    def test_the_same_bytes_each_time_and_from_every_thread(self) -> None:
        raw = kv_like(CHUNK)
        first = encoded(self.codec, CHUNK, raw)
        with ThreadPoolExecutor(4) as threads:
            others = list(threads.map(lambda _: encoded(self.codec, CHUNK, raw), range(8)))
            backs = list(threads.map(lambda data: decoded(self.codec, CHUNK, data), others))
        assert all((other == first).all() for other in others)
        assert all((back == backs[0]).all() for back in backs)

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_layer_that_is_not_finite_stays_exact(self, dtype: str, number: float) -> None:
        payload = Payload((2, 2, 3, 32, 64), dtype)
        self.codec.check(payload)
        raw = kv_like(payload)
        numbers = as_numbers(payload, raw).copy()
        numbers[1, 0, 1, 5, 7] = number
        from_float32(numbers, dtype, _words(payload, raw))
        back = decoded(self.codec, payload, encoded(self.codec, payload, raw))
        half = payload.nbytes // 2
        assert (back[half:] == raw[half:]).all()

    @pytest.mark.parametrize("number", [0.0, -0.0, 1e-38, 3e38, -1.0])
    def test_a_constant_layer(self, number: float) -> None:
        payload = Payload((1, 2, 2, 32, 64), "float32")
        self.codec.check(payload)
        raw = np.full(payload.layer_elements, number, np.float32).view(np.uint8)
        back = decoded(self.codec, payload, encoded(self.codec, payload, raw))
        numbers = as_numbers(payload, back)
        assert np.isfinite(numbers).all()
        assert np.abs(numbers - number).max() <= (self.max_relative_error * abs(number) + 1e-37)

    def test_layers_decode_as_they_arrive(self) -> None:
        raw = kv_like(CHUNK)
        data = encoded(self.codec, CHUNK, raw)
        whole = decoded(self.codec, CHUNK, data)
        arriving, out = np.zeros_like(data), np.zeros(CHUNK.nbytes, np.uint8)
        decoder = Decoder(self.codec, CHUNK, arriving, out)
        seen = []
        for size in range(0, len(data) + 1, max(1, len(data) // 50)):
            arriving[:size] = data[:size]
            seen.append(decoder.advance(size))
        arriving[:] = data
        assert decoder.advance(len(data)) == CHUNK.num_layers
        assert sorted(set(seen)) != [0], "nothing was decoded before the end"
        assert (out == whole).all()

    def test_it_describes_itself(self) -> None:
        parameters = self.codec.parameters()
        assert len(parameters) <= 256
        assert type(self.codec).from_parameters(parameters) == self.codec
        for wrong in (b"\xff" + parameters[1:], parameters + b"\0"):
            with pytest.raises(Incompatible):
                type(self.codec).from_parameters(wrong)

    def test_buffers_that_are_too_short(self) -> None:
        raw = kv_like(CHUNK)
        with pytest.raises(UsageError):
            encode(self.codec, CHUNK, raw, np.empty(10, np.uint8))
        with pytest.raises(UsageError):
            encode(self.codec, CHUNK, raw[:-2], np.empty(2 * CHUNK.nbytes, np.uint8))
        with pytest.raises(UsageError):
            decode(self.codec, CHUNK, raw, np.empty(CHUNK.nbytes - 2, np.uint8))

    @_settings
    @given(data=st.data())
    def test_hostile_bytes(self, data: st.DataObject) -> None:
        payload = Payload((2, 2, 1, 16, 64), "bfloat16")
        good = encoded(self.codec, payload, kv_like(payload))
        kind = data.draw(st.sampled_from(["flip", "cut", "grow", "splice", "noise"]))
        bad = good.copy()
        if kind == "flip":
            for _ in range(data.draw(st.integers(1, 8))):
                bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            bad = bad[: data.draw(st.integers(0, len(bad) - 1))]
        elif kind == "grow":
            bad = np.concatenate([bad, np.frombuffer(data.draw(st.binary(min_size=1)), np.uint8)])
        elif kind == "splice":
            begin = data.draw(st.integers(0, len(bad) - 1))
            patch = np.frombuffer(data.draw(st.binary(min_size=1, max_size=64)), np.uint8)
            bad[begin : begin + len(patch)] = patch[: len(bad) - begin]
        else:
            table = bad[: 4 * payload.num_layers].copy()
            seed = data.draw(st.integers(0, 2**32))
            bad = np.random.default_rng(seed).integers(0, 256, len(bad)).astype(np.uint8)
            bad[: len(table)] = table
        before = time.monotonic()
        try:
            decoded(self.codec, payload, bad)
        except CorruptObject:
            pass
        else:
            assert kind not in ("cut", "grow")
        assert time.monotonic() - before < 5, "no bound on the time it takes"

    @_settings
    @given(seed=st.integers(0, 2**32), kind=st.sampled_from(["bits", "kv"]))
    def test_any_numbers(self, seed: int, kind: str) -> None:
        payload = Payload((1, 2, 1, 16, 64), "bfloat16", start=seed % 3 * 128)
        if kind == "bits":
            rng = np.random.default_rng(seed)
            raw = rng.integers(0, 256, payload.nbytes).astype(np.uint8)
        else:
            raw = kv_like(payload, seed)
        back = decoded(self.codec, payload, encoded(self.codec, payload, raw))
        if self.codec.lossless:
            assert (back == raw).all()
        elif np.isfinite(as_numbers(payload, raw)).all():
            assert np.isfinite(as_numbers(payload, back)).all()
