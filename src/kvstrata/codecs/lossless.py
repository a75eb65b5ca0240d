"""Byte planes, the compressible ones through zstd: bit for bit, of any elements in any order.

The lower byte of a bfloat16, mantissa and sign, is noise (7.9 bits of entropy in real KV); its
exponent has 2.7. So the sign bit is rotated to the lower end, each state of a layer (keys, values)
is split into its byte planes, and a plane is compressed where that pays, else stored. About 1.49
times smaller in bfloat16.

A frame::

    uint32 little endian x S x planes: length, with bit 31 set where the plane is plain | planes

Planes go from the most significant byte to the least, keys first. A compressed plane is one zstd
frame.
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
# There is next to nothing to be found again in exponents, and a match in vain costs its price: few
# and long ones, so that nearly all is left to the Huffman coder. Smaller than level 1, and faster.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    window_log=17,
    hash_log=6,
    chain_log=6,
    write_content_size=True,
)
_SAMPLE = 1 << 12
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
        states, planes = payload.layer_shape[0], payload.item_bytes
        return planes * (states * _LENGTH.itemsize + payload.layer_elements)

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        states, num_planes = len(values), payload.item_bytes
        words = values.reshape(states, -1)
        lengths = np.empty((states, num_planes), _LENGTH)
        end, size = lengths.nbytes, words.shape[1]
        scratch = np.empty(size, np.uint8)
        for state in range(states):
            for plane in range(num_planes):
                _take(words[state], 8 * num_planes, num_planes - 1 - plane, scratch)
                packed = _compress(scratch)
                plain = packed is None
                part = scratch if packed is None else np.frombuffer(packed, np.uint8)
                out[end : end + len(part)] = part
                lengths[state, plane] = len(part) | (_PLAIN if plain else 0)
                end += len(part)
        out[: lengths.nbytes] = lengths.reshape(-1).view(np.uint8)
        return end

    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        states, num_planes = len(out), payload.item_bytes
        words = out.reshape(states, -1)
        begin = states * num_planes * _LENGTH.itemsize
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
                plane = _decompress(plane, words.shape[1])
            if len(plane) != words.shape[1]:
                raise corrupt(f"a plane of {len(plane)} bytes for {words.shape[1]} elements")
            planes.append(plane)
        for state in range(states):
            own = planes[state * num_planes : (state + 1) * num_planes]
            if num_planes == 2:
                _join(own[0], own[1], words[state])
            else:
                _join_any(own, words[state])


def _compress(plane: Bytes) -> bytes | None:
    """One zstd frame; None where it would not pay."""
    try:
        compressor = _thread.compressor
    except AttributeError:
        compressor = _thread.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
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


def _join_any(planes: list[Bytes], out: Elements) -> None:
    rotated = np.stack(planes[::-1], axis=1).view(out.dtype)[:, 0]
    bits = 8 * out.itemsize
    out[:] = rotated >> 1 | rotated << (bits - 1)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take(words: Elements, bits: int, plane: int, out: Bytes) -> None:
    """One byte of every word, whose ``bits`` bits are first rotated left by one."""
    for i in range(len(words)):
        word = np.uint64(words[i])
        out[i] = np.uint8(
            (word << np.uint64(1) | word >> np.uint64(bits - 1)) >> np.uint64(8 * plane)
        )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _join(high: Bytes, low: Bytes, out: Elements) -> None:
    for i in range(len(out)):
        rotated = np.uint16(high[i]) << np.uint16(8) | np.uint16(low[i])
        out[i] = rotated >> np.uint16(1) | rotated << np.uint16(15)
