"""Codecs: KV to bytes and back, one method a file. `docs/codecs.md` says which to choose."""

from __future__ import annotations

from kvstrata.codecs.base import Codec, Payload
from kvstrata.codecs.cachegen import CacheGen
from kvstrata.codecs.fp8 import Fp8
from kvstrata.codecs.kvtc import Kvtc
from kvstrata.codecs.kvtc import named as kvtc_named
from kvstrata.codecs.lossless import Lossless
from kvstrata.codecs.quantized import INTEGERS
from kvstrata.codecs.raw import Raw
from kvstrata.codecs.rotated import TURBO
from kvstrata.errors import Incompatible, UsageError, did_you_mean

__all__ = ["CODECS", "Codec", "Payload", "codec_named", "stored_codec"]

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Raw(),
        Lossless(),
        Fp8(),
        *INTEGERS,
        *TURBO,
        *(CacheGen(level) for level in range(1, 6)),
    )
}
"""Every codec that an operator may name, but for those of a calibration: ``kvtc-2`` and its kin."""

_FAMILIES: dict[str, type[Codec]] = {codec.family: type(codec) for codec in CODECS.values()}
_FAMILIES[Kvtc.family] = Kvtc


def codec_named(name: str) -> Codec:
    """The codec that an operator calls so.

    Raises:
        UsageError: there is none.
    """
    if name.startswith("kvtc-"):
        return kvtc_named(name)
    if name not in CODECS:
        raise UsageError(
            f"no codec {name!r}{did_you_mean(name, list(CODECS))}; there are {', '.join(CODECS)}"
        )
    return CODECS[name]


def stored_codec(family: str, parameters: bytes) -> Codec:
    """The codec that an object's header names; see `kvstrata.header.ObjectHeader`.

    Raises:
        Incompatible: this build cannot decode it.
    """
    if family not in _FAMILIES:
        raise Incompatible(f"unknown codec {family!r}; this build knows {', '.join(_FAMILIES)}")
    return _FAMILIES[family].from_parameters(parameters)
