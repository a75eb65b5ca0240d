"""Compile every kernel as it is launched, for GPUs that are not here: run by `test_triton_kernels`.

Launches are caught, and the kernel is compiled with the types and constants of the launch down to
the GPU's machine code. Prints the names of kernels, or says which instruction is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kvstrata.codecs.base import Payload
from kvstrata.codecs.fp8 import Fp8
from kvstrata.codecs.quantized import INTEGERS
from kvstrata.codecs.rotated import Rotated
from kvstrata.codecs.triton.kernels import decode_layer, encode_layer
from kvstrata.testing.codecs import kv_like

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.uint8: "*u8"}
_SCALARS = {int: "i32", float: "fp32"}
_ARCHITECTURES = (80, 90)

# A product and a sum rounded once, subnormals taken for zero, divisions that are not exact.
_INEXACT = re.compile(r"\bfma\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*|\bdiv\.full\S*")


def compile_instead(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Takes the place of ``kernel[grid]``."""

    def launch(*arguments: Any, enable_fp_fusion: bool = True) -> None:
        signature, constants = {}, {}
        for parameter, value in zip(kernel.params, arguments, strict=True):
            if parameter.is_constexpr or (type(value) is int and value == 1):  # as Triton does
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
            else:
                signature[parameter.name] = _SCALARS[type(value)]
        for architecture in _ARCHITECTURES:
            compiled = triton.compile(
                ASTSource(kernel, signature, constants),
                target=GPUTarget("cuda", architecture, 32),
                options={"enable_fp_fusion": enable_fp_fusion},
            )
            assert compiled.asm["cubin"]
            inexact = _INEXACT.findall(compiled.asm["ptx"])
            assert not inexact, (kernel.fn.__qualname__, inexact)
        print(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")

    return launch


if __name__ == "__main__":
    JITFunction.__getitem__ = compile_instead
    for payload in (
        Payload((1, 2, 3, 128, 64), "bfloat16"),
        Payload((1, 2, 1, 5, 8), "float32", 3),
    ):
        raw = kv_like(payload)
        words = raw.view(f"u{payload.item_bytes}").reshape(payload.layer_shape)
        values = torch.from_numpy(raw).view(getattr(torch, payload.dtype))
        for codec in (Fp8(), INTEGERS[2], Rotated(5, 2)):
            out = np.empty(codec.layer_bound(payload), np.uint8)
            frame = out[: codec.encode_layer(words, 0, payload, out)]
            encode_layer(codec, values.reshape(payload.layer_shape), payload)
            decode_layer(codec, torch.from_numpy(frame.copy()), payload)
