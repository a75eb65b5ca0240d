"""An encoded payload: the lengths of its layers, then the layers, each decodable alone.

::

    uint32 x L, little endian: the length of each frame | frame 0 | frame 1 | ... | frame L - 1

The frames fill the payload exactly. `docs/codecs.md` is the page of this format.
"""

from __future__ import annotations

import numpy as np

from kvstrata.codecs.base import Codec, Payload, corrupt
from kvstrata.errors import LayoutMismatch, UsageError
from kvstrata.layout import WORDS, Bytes, Elements

_LENGTH = np.dtype("<u4")


def encoded_bound(codec: Codec, payload: Payload) -> int:
    """The most bytes that `encode` can write."""
    return payload.num_layers * (_LENGTH.itemsize + codec.layer_bound(payload))


def encode(codec: Codec, payload: Payload, raw: Bytes, out: Bytes) -> int:
    """Encode a whole payload.

    Args:
        codec: the method.
        payload: what ``raw`` is.
        raw: its bytes, C-contiguous.
        out: at least ``encoded_bound`` bytes, not overlapping ``raw``.
    Returns:
        The number of bytes written, from the beginning of ``out``.
    Raises:
        LayoutMismatch: the codec cannot encode such a payload.
        UsageError: a buffer is too short.
    """
    codec.check(payload)
    layers = _layers(payload, raw)
    if len(out) < encoded_bound(codec, payload):
        raise UsageError(f"{len(out)} bytes to encode into, not {encoded_bound(codec, payload)}")
    lengths = np.empty(payload.num_layers, _LENGTH)
    end = lengths.nbytes
    for layer, values in enumerate(layers):
        lengths[layer] = codec.encode_layer(values, layer, payload, out[end:])
        end += int(lengths[layer])
    out[: lengths.nbytes] = lengths.view(np.uint8)
    return end


class Decoder:
    """Decodes a payload while it arrives.

    Args:
        codec: the method.
        payload: what comes out.
        encoded: where the encoded bytes are, or will be; their number is the stored length.
        out: ``payload.nbytes`` bytes, C-contiguous, overwritten.
    Raises:
        LayoutMismatch: the codec does not encode such payloads.
        UsageError: ``out`` has another size.
    """

    def __init__(self, codec: Codec, payload: Payload, encoded: Bytes, out: Bytes) -> None:
        codec.check(payload)
        self._codec = codec
        self._payload = payload
        self._encoded = encoded
        self._out = _layers(payload, out)
        self._ends: list[int] = []
        self.num_decoded = 0

    def advance(self, num_bytes: int) -> int:
        """Decode every layer that the first ``num_bytes`` of the encoded bytes complete.

        Returns:
            The number of layers decoded so far.
        Raises:
            CorruptObject: these bytes are not what the codec writes.
        """
        table = self._payload.num_layers * _LENGTH.itemsize
        if not self._ends:
            if len(self._encoded) < table:
                raise corrupt(f"{len(self._encoded)} bytes, less than the table of lengths")
            if num_bytes < table:
                return 0
            lengths = self._encoded[:table].view(_LENGTH).astype(np.int64)
            self._ends = [int(end) for end in table + np.cumsum(lengths)]
            if self._ends[-1] != len(self._encoded):
                raise corrupt(f"frames end at {self._ends[-1]} of {len(self._encoded)} bytes")
        for layer in range(self.num_decoded, self._payload.num_layers):
            end = self._ends[layer]
            if end > num_bytes:
                break
            begin = self._ends[layer - 1] if layer else table
            frame = self._encoded[begin:end]
            self._codec.decode_layer(frame, layer, self._payload, self._out[layer])
            self.num_decoded += 1
        return self.num_decoded


def decode(codec: Codec, payload: Payload, encoded: Bytes, out: Bytes) -> None:
    """Decode a whole payload; arguments and errors are those of `Decoder`."""
    Decoder(codec, payload, encoded, out).advance(len(encoded))


def _layers(payload: Payload, raw: Bytes) -> Elements:
    if raw.dtype != np.uint8 or raw.ndim != 1 or not raw.flags.c_contiguous:
        raise LayoutMismatch(f"a payload is plain bytes, not {raw.dtype} {raw.shape}")
    if len(raw) != payload.nbytes:
        raise UsageError(f"{len(raw)} bytes for {payload}, not {payload.nbytes}")
    words: Elements = raw.view(WORDS[payload.item_bytes])
    return words.reshape(payload.shape)
