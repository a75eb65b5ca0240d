"""No codec: the bytes as they are. The baseline, and proof of the interface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvstrata.codecs.base import Codec, Payload, corrupt
from kvstrata.errors import Incompatible
from kvstrata.layout import Bytes, Elements


@dataclass(frozen=True)
class Raw(Codec):
    """Copies."""

    family = "raw"
    lossless = True

    @property
    def name(self) -> str:
        return "raw"

    def parameters(self) -> bytes:
        return b""

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Raw:
        if parameters:
            raise Incompatible(f"raw has no parameters, not {parameters.hex()}")
        return cls()

    def layer_bound(self, payload: Payload) -> int:
        return payload.layer_elements * payload.item_bytes

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        source = values.reshape(-1).view(np.uint8)
        out[: len(source)] = source
        return len(source)

    def decode_layer(self, frame: Bytes, layer: int, payload: Payload, out: Elements) -> None:
        if len(frame) != out.nbytes:
            raise corrupt(f"{len(frame)} raw bytes, not {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = frame
