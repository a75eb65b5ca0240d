"""Codecs on a GPU: the bytes that the CPU writes, and the numbers that it reads back.

`fp8`, the integers and the rotated levels, one file each. Whether a layer is coded or kept exact is
decided here. Runs in Triton's interpreter too, where TRITON_INTERPRET=1 is set before this module
is imported.
"""

from __future__ import annotations

import torch

from kvstrata.codecs.base import Codec, Payload, corrupt
from kvstrata.codecs.fp8 import Fp8
from kvstrata.codecs.quantized import Quantized
from kvstrata.codecs.rotated import Rotated
from kvstrata.codecs.triton import fp8, integers, rotated
from kvstrata.codecs.triton.packing import DTYPES, as_bytes, of_bytes
from kvstrata.errors import UsageError

_EXACT, _CODED = 0, 1  # the first byte of a frame, as in `lossy`


def encode_layer(codec: Codec, values: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Encode one layer where it lies.

    Args:
        codec: `Fp8`, `Quantized` or `Rotated`.
        values: (S, H, T, D), of the payload's dtype, on a GPU.
        payload: of which it is a layer.
    Returns:
        uint8, on the same device: what ``codec.encode_layer`` writes.
    Raises:
        LayoutMismatch: the codec cannot encode such a payload.
        UsageError: there are no kernels for this codec.
    """
    codec.check(payload)
    if not bool(values.isfinite().all()):
        return torch.cat([_byte(_EXACT, values.device), as_bytes(values)])
    numbers = values.float()
    if isinstance(codec, Fp8):
        coded = fp8.encode_numbers(codec, numbers, payload)
    elif isinstance(codec, Quantized):
        coded = integers.encode_numbers(codec, numbers, payload)
    elif isinstance(codec, Rotated):
        coded = rotated.encode_numbers(codec, numbers, payload)
    else:
        raise UsageError(f"no kernels for {codec.name}")
    return torch.cat([_byte(_CODED, values.device), coded])


def decode_layer(codec: Codec, frame: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Decode one layer where it lies.

    Args:
        codec: `Fp8`, `Quantized` or `Rotated`.
        frame: uint8, on a GPU; checked, for it may be anything.
        payload: of which it is a layer.
    Returns:
        (S, H, T, D), of the payload's dtype, on the same device: what ``codec.decode_layer`` gives
        of a frame that an encoder wrote.
    Raises:
        CorruptObject: the frame is not what this codec writes.
        LayoutMismatch, UsageError: as of `encode_layer`.
    """
    codec.check(payload)
    kind = int(frame[0]) if frame.numel() else _CODED + 1
    dtype, body = DTYPES[payload.dtype], frame[1:]
    if kind > _CODED:
        raise corrupt("its first byte is neither 0 nor 1")
    if kind == _EXACT:
        if body.numel() != payload.layer_elements * payload.item_bytes:
            raise corrupt(f"{body.numel()} exact bytes")
        return of_bytes(body, dtype).reshape(payload.layer_shape)
    out = torch.empty(payload.layer_shape, dtype=torch.float32, device=frame.device)
    if isinstance(codec, Fp8):
        fp8.decode_numbers(codec, body, payload, out)
    elif isinstance(codec, Quantized):
        integers.decode_numbers(codec, body, payload, out)
    elif isinstance(codec, Rotated):
        rotated.decode_numbers(codec, body, payload, out)
    else:
        raise UsageError(f"no kernels for {codec.name}")
    return out.to(dtype)


def _byte(value: int, device: torch.device) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.uint8, device=device)
