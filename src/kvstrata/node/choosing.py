"""Which codec a tier stores an object with.

Either always the same one, or the one that is sooner back of the two that lose nothing; or, with
``codec = auto``, what the model's table says: `kvstrata.node.auto`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstrata.codecs import Codec

logger = logging.getLogger(__name__)


class Choice(ABC):
    """How one tier stores new objects.

    Args:
        name: for the operator.
        lossless: whether it always gives back what it was given.
        contenders: codecs that are to be tried on the tier before it stores anything.
    """

    name: str
    lossless: bool
    contenders: tuple[str, ...] = ()

    def tried(self, tier: str, seconds: Mapping[str, float]) -> None:  # noqa: B027 - as a rule
        """Hear how soon each of them gives the same KV back; `kvstrata.node.trial`."""

    @abstractmethod
    def of(self, weights: str, compute_s: float) -> Codec | None:
        """The codec for an object; None: as it is. May block: not for the node's loop.

        Args:
            weights: `kvstrata.identity.weights_identity` of what made the KV; "": unknown.
            compute_s: what computing one raw byte of it takes.
        """


class Always(Choice):
    """One codec for everything."""

    def __init__(self, codec: Codec) -> None:
        self.name = codec.name
        self.lossless = codec.lossless
        self._codec = codec

    def of(self, weights: str, compute_s: float) -> Codec | None:
        return self._codec


class Exact(Choice):
    """Raw, or lossless on a tier so slow that the saved bytes take longer than decoding them."""

    lossless = True
    contenders = ("raw", "lossless")

    def __init__(self) -> None:
        self._codec: Codec | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"exact ({self._codec.name if self._codec is not None else 'raw'})"

    def tried(self, tier: str, seconds: Mapping[str, float]) -> None:
        from kvstrata.codecs import codec_named

        if seconds["lossless"] < seconds["raw"]:
            self._codec = codec_named("lossless")
        logger.info("%s gives KV back in %.1f ms raw, %.1f ms lossless: %s", tier,
                    seconds["raw"] * 1e3, seconds["lossless"] * 1e3, self.name)  # fmt: skip

    def of(self, weights: str, compute_s: float) -> Codec | None:
        return self._codec
