"""Byte planes, the compressible ones through zstd: bit for bit, of any elements in any order.

The low byte of a bfloat16 is noise (7.9 bits of entropy in real KV); the high one, sign and upper
exponent, has 2.9. So a layer is split into its byte planes, and a plane is compressed where that
pays, else stored. About 1.47 times smaller in bfloat16.

A frame::

    uint32 little endian x planes: length, with bit 31 set where the plane is plain | planes

Planes go from the most significant byte to the least. A compressed plane is one zstd frame.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numba
import numpy as np
import zstandard

from kvstrata.codecs.base import Codec, Payload, corrupt
from kvstrata.errors import Incompatible
from kvstrata.layout import Bytes, Elements

VERSION = b"\x01"

_LENGTH = np.dtype("<u4")
_PLAIN = 1 << 31
_LEVEL = 1  # higher ones cost much time and gain nothing on exponents
_SAMPLE = 1 << 14
_WORTHWHILE = 0.95

_thread = threading.local()


@dataclass(frozen=True)
class Lossless(Codec):
    """Splits every element into bytes and compresses those that repeat."""

    family = "lossless"
    lossless = True

    @property
    def name(self) -> str:
        return "lossless"

    def parameters(self) -> bytes:
        return VERSION

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Lossless:
        if parameters != VERSION:
            raise Incompatible(f"lossless {parameters.hex() or 'of no version'}, not version 1")
        return cls()

    def layer_bound(self, payload: Payload) -> int:
        return payload.item_bytes * (_LENGTH.itemsize + payload.layer_elements)

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        words, num_planes = values.reshape(-1), payload.item_bytes
        lengths = np.empty(num_planes, _LENGTH)
        end, size = lengths.nbytes, len(words)
        scratch = np.empty(size, np.uint8)
        for plane in range(num_planes):
            _take(words, 8 * (num_planes - 1 - plane), scratch)
            packed = _compress(scratch)
            if packed is None:
                out[end : end + size] = scratch
                lengths[plane] = size | _PLAIN
                end += size
            else:
                out[end : end + len(packed)] = np.frombuffer(packed, np.uint8)
                lengths[plane] = len(packed)
                end += len(packed)
        out[: lengths.nbytes] = lengths.view(np.uint8)
        return end

    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        words, num_planes = out.reshape(-1), payload.item_bytes
        begin = num_planes * _LENGTH.itemsize
        if len(frame) < begin:
            raise corrupt("shorter than its table of planes")
        lengths = [int(length) for length in frame[:begin].view(_LENGTH)]
        if begin + sum(length & ~_PLAIN for length in lengths) != len(frame):
            raise corrupt("the planes do not fill the frame")
        planes = []
        for length in lengths:
            plane = frame[begin : begin + (length & ~_PLAIN)]
            begin += len(plane)
            if not length & _PLAIN:
                plane = _decompress(plane, len(words))
            if len(plane) != len(words):
                raise corrupt(f"a plane of {len(plane)} bytes for {len(words)} elements")
            planes.append(plane)
        if num_planes == 2:
            _join(planes[0], planes[1], words)
        else:
            words.view(np.uint8).reshape(-1, num_planes)[:] = np.stack(planes[::-1], axis=1)


def _compress(plane: Bytes) -> bytes | None:
    """One zstd frame; None where it would not pay."""
    try:
        compressor = _thread.compressor
    except AttributeError:
        compressor = _thread.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    # Noise is found out on a sample: compressing it in vain costs more than all the rest.
    middle = max(0, len(plane) - _SAMPLE) // 2
    sample = plane[middle : middle + _SAMPLE]
    if len(plane) > 2 * _SAMPLE and len(compressor.compress(sample)) > _WORTHWHILE * len(sample):
        return None
    packed: bytes = compressor.compress(plane)
    return packed if len(packed) < len(plane) else None


def _decompress(packed: Bytes, nbytes: int) -> Bytes:
    try:
        decompressor = _thread.decompressor
    except AttributeError:
        decompressor = _thread.decompressor = zstandard.ZstdDecompressor()
    try:
        # A frame may claim any size; only one is right, and nothing is allocated for another.
        if zstandard.frame_content_size(packed.data) != nbytes:
            raise corrupt("a plane of another size")
        plane = decompressor.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise corrupt(f"a plane is no zstd frame: {error}") from error
    return np.frombuffer(plane, np.uint8)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take(words: Elements, shift: int, out: Bytes) -> None:
    for i in range(len(words)):
        out[i] = words[i] >> shift


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _join(high: Bytes, low: Bytes, out: Elements) -> None:
    for i in range(len(out)):
        out[i] = np.uint16(high[i]) << np.uint16(8) | np.uint16(low[i])
