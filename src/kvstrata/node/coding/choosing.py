"""Which codec a tier stores an object with.

Either always the same one, or the one that is sooner back of the two that lose nothing; or, with
``codec = auto``, what the model's table says: `kvstrata.node.coding.auto`.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from kvstrata.node.coding.recoding import NO_CODEC, warm_up
from kvstrata.quality.choice import RAW, Candidate, Place

if TYPE_CHECKING:
    from kvstrata.codecs import Codec

logger = logging.getLogger(__name__)

MARGIN = 1.2
"""By which lossless has to be sooner back than raw: speeds are those of one moment."""
BEYOND_DECODING = 1e9
"""A tier that brings more bytes a second for each core is faster than any decoder; so that nobody
need import one to see."""


class Choice(ABC):
    """How one tier stores new objects.

    Args:
        name: for the operator.
        lossless: whether it always gives back what it was given.
        needs_speed: whether it depends on how fast the tier is.
    """

    name: str
    lossless: bool
    needs_speed = False
    always_raw = False
    """Whether `of` has no codec for anything any more, so that nobody need ask it."""

    @abstractmethod
    def of(self, weights: str, compute_s: float, place: Place | None) -> Codec | None:
        """The codec for an object; None: as it is. May block: not for the node's loop.

        Args:
            weights: `kvstrata.identity.weights_identity` of what made the KV; "": unknown.
            compute_s: what computing one raw byte of it takes.
            place: the tier; None while its speed is not known.
        """


class Always(Choice):
    """One codec for everything."""

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self.lossless = codec.lossless
        self._codec = codec

    def of(self, weights: str, compute_s: float, place: Place | None) -> Codec | None:
        return self._codec

    def made(self, family: str, parameters: bytes) -> bool:
        """Whether an object with these in its header was made by this very codec."""
        return (family, parameters) == (self._codec.family, self._codec.parameters())


class Exact(Choice):
    """Raw, or lossless on a tier so slow that the saved bytes take longer than decoding them.

    Decided once, with the first object after the tier's speed is known; raw before that.
    """

    lossless = True
    needs_speed = True

    def __init__(self) -> None:
        self._codec: Codec | None = None
        self._decided = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:  # type: ignore[override]
        if not self._decided:
            return "exact (raw so far)"
        return f"exact ({self._codec.name if self._codec is not None else 'raw'})"

    def of(self, weights: str, compute_s: float, place: Place | None) -> Codec | None:
        with self._lock:
            if not self._decided and place is not None:
                self._decided = True  # raw, should it fail: the caller counts that, once
                try:
                    self._codec = _sooner_than_raw(place)
                finally:
                    self.always_raw = self._codec is None
                logger.info("%s reads %.0f MB/s: it stores %s", place.name,
                            place.bytes_per_s / 1e6, self.name)  # fmt: skip
            return self._codec


def _sooner_than_raw(place: Place) -> Codec | None:
    """The lossless codec, if it has KV back from there clearly sooner."""
    if place.bytes_per_s > place.cores * BEYOND_DECODING:
        return None
    try:
        from kvstrata.codecs import codec_named

        codec = codec_named("lossless")
        warm_up(codec)
        lossless = _timed(codec)
    except NO_CODEC as error:
        logger.warning("%s stores raw, since lossless does not work here: %s", place.name, error)
        return None
    return codec if MARGIN * lossless.load_s(place) < RAW.load_s(place) else None


def _timed(codec: Codec) -> Candidate:
    """A codec on numbers like those of KV: normal, every channel of its own size."""
    from kvstrata.codecs.elements import from_float32
    from kvstrata.quality.coding import speeds, through

    rng = np.random.default_rng(0)
    size = np.exp2(rng.integers(-3, 4, (8, 2, 4, 1, 64))).astype(np.float32)
    words = np.empty((8, 2, 4, 512, 64), np.uint16)
    from_float32(rng.standard_normal(words.shape, np.float32) * size, "bfloat16", words)
    _, decode_gbps = speeds(codec, words)
    return Candidate(codec.name, through(codec, words).bits(512), decode_gbps * 1e9)
