"""What a codec sees of an object, and how its frames lie in the payload as it is stored.

A portable payload is a rectangle, and so is a native one to a lossless codec: a frame a layer. Of
kept tokens each head has its own number, so each head of each layer has a frame, behind the counts
and positions, which stay as they are. `docs/codecs.md` is the page of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from kvstrata.codecs import Codec, Payload, framing
from kvstrata.errors import CorruptObject, LayoutMismatch
from kvstrata.header import ObjectHeader
from kvstrata.layout import ITEM_BYTES, WORDS, Bytes, Elements
from kvstrata.selection import kept as k

_LENGTH = np.dtype("<u4")


class Form(ABC):
    """A raw payload, as one codec takes it."""

    @abstractmethod
    def bound(self, raw: Bytes) -> int:
        """The most bytes that `encode` writes of this raw payload.

        Raises:
            LayoutMismatch: it is not what its header says.
        """

    @abstractmethod
    def encode(self, raw: Bytes, out: Bytes) -> int:
        """Encode a raw payload; the number of bytes written to ``out``, which has ``bound``."""

    @abstractmethod
    def decode(self, stored: Bytes, raw: Bytes) -> None:
        """Undo it, into all of ``raw``.

        Raises:
            CorruptObject: this is not what `encode` writes.
        """


def form_of(header: ObjectHeader, codec: Codec) -> Form:
    """How an object's payload is given to a codec.

    Raises:
        LayoutMismatch: it is nothing for this codec.
        UsageError: the header describes no payload that there may be.
    """
    if header.kind == "kept":
        return _Kept(header, codec)
    return _Rectangle(header, codec)


class _Rectangle(Form):
    """Numbers in a known order; for a lossless codec words."""

    def __init__(self, header: ObjectHeader, codec: Codec) -> None:
        if header.kind == "portable" and len(header.shape) == 5:
            layers, states, heads, tokens, dim = header.shape
            payload = Payload((layers, states, heads, tokens, dim), header.dtype, header.start)
        elif codec.lossless and header.dtype in ITEM_BYTES:
            layers = header.shape[0]
            elements = header.raw_length // (layers * ITEM_BYTES[header.dtype])
            payload = Payload((layers, 1, 1, 1, elements), header.dtype, header.start)
        else:
            raise _nothing(header, codec)
        if payload.nbytes != header.raw_length:
            raise LayoutMismatch(f"{header.raw_length} bytes are not {payload}")
        codec.check(payload)
        self._codec, self._payload = codec, payload

    def bound(self, raw: Bytes) -> int:
        return framing.encoded_bound(self._codec, self._payload)

    def encode(self, raw: Bytes, out: Bytes) -> int:
        return framing.encode(self._codec, self._payload, raw, out)

    def decode(self, stored: Bytes, raw: Bytes) -> None:
        framing.decode(self._codec, self._payload, stored, raw)


class _Kept(Form):
    """Selected tokens, the rows of one head at a time."""

    def __init__(self, header: ObjectHeader, codec: Codec) -> None:
        self._codec, self._shape, self._dtype = codec, header.shape, header.dtype
        self._tokens, self._positions = header.boundary, header.positions
        if codec.positional:
            raise LayoutMismatch(f"{codec.name} takes the tokens of a payload to be neighbours")
        if len(header.shape) != 5 or header.shape[1] != k.STATES or header.dtype not in ITEM_BYTES:
            raise _nothing(header, codec)
        if header.raw_length != k.payload_bytes(header.shape, header.dtype):
            raise LayoutMismatch(f"{header.raw_length} bytes are no kept payload {header.shape}")
        self._num_heads = header.shape[0] * header.shape[2]
        codec.check(self._payload(header.shape[3], 0))

    def bound(self, raw: Bytes) -> int:
        kept = self._kept(raw)
        bounds = (self._codec.layer_bound(payload) for *_, payload in self._heads(kept))
        return k.table_bytes(self._shape) + _LENGTH.itemsize * kept.counts.size + sum(bounds)

    def encode(self, raw: Bytes, out: Bytes) -> int:
        kept, table = self._kept(raw), k.table_bytes(self._shape)
        out[:table] = raw[:table]
        lengths = np.zeros(kept.counts.shape, _LENGTH)
        end = table + lengths.nbytes
        for layer, head, own, payload in self._heads(kept):
            values: Elements = np.stack((kept.keys[own], kept.values[own]))[:, np.newaxis]
            lengths[layer, head] = self._codec.encode_layer(values, layer, payload, out[end:])
            end += int(lengths[layer, head])
        out[table : table + lengths.nbytes] = lengths.reshape(-1).view(np.uint8)
        return end

    def decode(self, stored: Bytes, raw: Bytes) -> None:
        _, states, _, rows, dim = self._shape
        table = k.table_bytes(self._shape)
        begin = table + _LENGTH.itemsize * self._num_heads
        if len(stored) < begin:
            raise CorruptObject(f"kept: {len(stored)} bytes, less than counts and lengths")
        raw[:table] = stored[:table]
        # Without elements it is checked all the same, and says where each head's rows belong.
        raw[table:] = 0
        kept = k.decode(raw, self._shape, self._dtype, self._tokens)
        self._check_digest(raw)
        lengths = stored[table:begin].view(_LENGTH).astype(np.int64).reshape(kept.counts.shape)
        if begin + int(lengths.sum()) != len(stored) or lengths[kept.counts == 0].any():
            raise CorruptObject(f"kept: frames do not fill {len(stored)} bytes")
        elements = raw[table:].view(WORDS[ITEM_BYTES[self._dtype]]).reshape(states, rows, dim)
        for layer, head, own, payload in self._heads(kept):
            frame = stored[begin : begin + int(lengths[layer, head])]
            begin += len(frame)
            values: Elements = np.empty(payload.layer_shape, elements.dtype)
            self._codec.decode_layer(frame, layer, payload, values)
            elements[:, own] = values[:, 0]

    def _kept(self, raw: Bytes) -> k.Kept:
        try:
            kept = k.decode(raw, self._shape, self._dtype, self._tokens)
            self._check_digest(raw)
        except CorruptObject as error:
            raise LayoutMismatch(str(error)) from error
        return kept

    def _check_digest(self, raw: Bytes) -> None:
        if k.positions_digest(raw, self._shape) != self._positions:
            raise CorruptObject("kept: the positions are not those of the header")

    def _heads(self, kept: k.Kept) -> Iterator[tuple[int, int, slice, Payload]]:
        """Layer and head, their rows and what a codec sees of them, where there are any."""
        ends = kept.ends
        for layer, head in np.argwhere(kept.counts).tolist():
            count, end = int(kept.counts[layer, head]), int(ends[layer, head])
            first = int(kept.positions[end - count])
            yield layer, head, slice(end - count, end), self._payload(count, first)

    def _payload(self, rows: int, start: int) -> Payload:
        """The rows of one head, whose first one is at this position."""
        layers, states, _, _, dim = self._shape
        return Payload((layers, states, 1, rows, dim), self._dtype, start)


def _nothing(header: ObjectHeader, codec: Codec) -> LayoutMismatch:
    return LayoutMismatch(
        f"a {header.kind} payload of {header.dtype} {header.shape} is nothing for {codec.name}"
    )
