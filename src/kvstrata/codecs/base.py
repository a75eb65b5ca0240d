"""What a codec is: one layer of a chunk to bytes and back.

A codec is a frozen value. It sees one layer at a time, ``[S, H, T, D]``, and never another layer or
chunk, so that layers can be decoded as they arrive; `kvstrata.codecs.framing` puts the layers of a
payload together. Elements come and go as unsigned integers of their width (bfloat16 and float16:
``uint16``), as everywhere in KVStrata; `kvstrata.codecs.elements` turns them into numbers.

Letters: L layers, S states (2: key, value; 1: a latent), H KV heads, T tokens of the chunk,
D head_dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvstrata.errors import CorruptObject, LayoutMismatch, UsageError
from kvstrata.layout import ITEM_BYTES, Bytes, Elements

MAX_PAYLOAD_BYTES = 1 << 32
"""More than this in one payload is taken for nonsense: an object holds one chunk of one group."""


@dataclass(frozen=True)
class Payload:
    """The tensor that is encoded, as the object's header describes it.

    Args:
        shape: (L, S, H, T, D). Of a native payload, which only lossless codecs take, it is
            (L, 1, 1, 1, elements of a layer).
        dtype: of an element, a key of `kvstrata.layout.ITEM_BYTES`.
        start: position of the first token in its prompt; attention sinks sit at position 0, and
            a rotary phase follows from it.
    Raises:
        UsageError: no such dtype, a size below 1, or more than 4 GiB in all.
    """

    shape: tuple[int, int, int, int, int]
    dtype: str
    start: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise UsageError(f"dtype {self.dtype!r}: expected one of {', '.join(ITEM_BYTES)}")
        if len(self.shape) != 5 or min(self.shape) < 1 or self.start < 0:
            raise UsageError(f"{self} is not [L, S, H, T, D] with sizes of 1 and more")
        if self.nbytes > MAX_PAYLOAD_BYTES:
            raise UsageError(f"{self} has more than {MAX_PAYLOAD_BYTES} bytes")

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.shape[0]

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """(S, H, T, D)."""
        return self.shape[1:]

    @property
    def layer_elements(self) -> int:
        """Elements of one layer."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole payload before encoding."""
        return math.prod(self.shape) * self.item_bytes


class Codec(ABC):
    """One method, with its parameters fixed: a frozen dataclass.

    Encoding is deterministic, so golden bytes can pin it. ``decode_layer`` meets hostile bytes:
    whatever it is given, it returns or raises `CorruptObject` within time and memory bounded by
    the payload's size, and writes nowhere but into ``out``. Both run in threads, several at once,
    and their loops release the GIL.
    """

    family: ClassVar[str]
    """What the header's ``codec`` field says; with the parameters it names a codec exactly."""

    lossless: ClassVar[bool] = False
    """Whether decoding gives back every bit, of any order of any elements, numbers or not."""

    positional: ClassVar[bool] = False
    """Whether each token is taken to stand right behind the one before it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What an operator writes in the configuration: ``int4``."""

    @abstractmethod
    def parameters(self) -> bytes:
        """All that decoding needs besides the payload's shape, at most 256 bytes.

        The first byte is the version of the family's format.
        """

    @classmethod
    @abstractmethod
    def from_parameters(cls, parameters: bytes) -> Codec:
        """The codec that wrote these parameters.

        Raises:
            Incompatible: another version, or a value this build does not know.
        """

    def check(self, payload: Payload) -> None:  # noqa: B027 - most codecs take all there is
        """Raise LayoutMismatch if this codec cannot encode such a payload; the message says why."""

    @abstractmethod
    def layer_bound(self, payload: Payload) -> int:
        """The most bytes that one encoded layer can take."""

    @abstractmethod
    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        """Encode one layer.

        Args:
            values: (S, H, T, D), C-contiguous words.
            layer: its number, from 0.
            payload: of which it is a layer.
            out: at least ``layer_bound`` bytes.
        Returns:
            The number of bytes written to ``out``, from its beginning.
        """

    @abstractmethod
    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        """Decode one layer.

        Args:
            frame: exactly what `encode_layer` wrote; checked, for it may be anything.
            layer: its number, from 0.
            payload: of which it is a layer.
            out: (S, H, T, D), C-contiguous words, overwritten.
        Raises:
            CorruptObject: the frame is not what this codec writes.
        """


def floating(payload: Payload) -> None:
    """The check of codecs that compute with the numbers.

    Raises:
        LayoutMismatch: the elements are not bfloat16, float16 or float32.
    """
    if payload.dtype not in ("bfloat16", "float16", "float32"):
        raise LayoutMismatch(
            f"elements of {payload.dtype}; lossy codecs take bfloat16, float16 and float32. "
            "Name a lossless codec for this model"
        )


def corrupt(what: str) -> CorruptObject:
    """The error of a frame that no encoder wrote."""
    return CorruptObject(f"encoded layer: {what}")
