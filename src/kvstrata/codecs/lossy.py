"""What the lossy codecs share: numbers in, numbers out, and layers that must stay exact.

A frame begins with one byte: 0, and the layer's raw bytes follow, because it holds a number that
is not finite (no scale fits it); or 1, and the method's own bytes follow.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from kvstrata.codecs.base import Codec, Payload, corrupt, floating
from kvstrata.codecs.elements import Floats, from_float32, to_float32
from kvstrata.layout import Bytes, Elements

_EXACT, _CODED = 0, 1


class LossyCodec(Codec):
    """A codec of finite numbers. Implement `numbers_bound`, `encode_numbers`, `decode_numbers`."""

    def check(self, payload: Payload) -> None:
        floating(payload)

    def layer_bound(self, payload: Payload) -> int:
        exact = payload.layer_elements * payload.item_bytes
        return 1 + max(exact, self.numbers_bound(payload))

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        numbers = to_float32(values, payload.dtype)
        # A sum is finite only if every term is, and one pass is cheaper than a mask of flags.
        with np.errstate(invalid="ignore"):  # a signalling NaN is one more that is not finite
            total = np.sum(np.abs(numbers), dtype=np.float64)
        if not np.isfinite(total):
            exact = values.reshape(-1).view(np.uint8)
            out[0] = _EXACT
            out[1 : 1 + len(exact)] = exact
            return 1 + len(exact)
        out[0] = _CODED
        return 1 + self.encode_numbers(numbers, layer, payload, out[1:])

    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        if len(frame) == 0 or frame[0] > _CODED:
            raise corrupt("its first byte is neither 0 nor 1")
        if frame[0] == _EXACT:
            if len(frame) != 1 + out.nbytes:
                raise corrupt(f"{len(frame) - 1} exact bytes, not {out.nbytes}")
            out.reshape(-1).view(np.uint8)[:] = frame[1:]
            return
        numbers = np.empty(payload.layer_shape, np.float32)
        self.decode_numbers(frame[1:], layer, payload, numbers)
        from_float32(numbers, payload.dtype, out)

    @abstractmethod
    def numbers_bound(self, payload: Payload) -> int:
        """The most bytes that `encode_numbers` may write for one layer."""

    @abstractmethod
    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        """Encode the finite ``numbers`` (S, H, T, D) of one layer; returns the bytes written."""

    @abstractmethod
    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        """Decode into ``out``, (S, H, T, D).

        Raises:
            CorruptObject: these are not bytes that `encode_numbers` writes.
        """
