"""bfloat16 on a processor without AVX-512, where torch multiplies matrices number by number.

That takes a test of a real model ten times as long as the others have. So it multiplies in float32
there, of the same numbers, and rounds what comes out.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

ARE_FAST = "avx512f" in Path("/proc/cpuinfo").read_text()
"""Whether this processor multiplies bfloat16 as fast as it should."""
LARGE = 1 << 16
"""Elements of a weight; smaller ones are not worth it."""


def make_products_fast() -> None:
    """Have all linear layers of this process multiply so, if it helps here. Repeatable."""
    import torch

    narrow = torch.nn.functional.linear
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or hasattr(narrow, "wide"):
        return
    wide: dict[int, tuple[weakref.ref[Any], int, Any]] = {}

    def widened(weight: Any) -> Any:
        """A weight in float32, made again when it was changed."""
        version = 0 if weight.is_inference() else weight._version
        known = wide.get(id(weight))
        if known is None or known[0]() is not weight or known[1] != version:
            key = id(weight)
            known = weakref.ref(weight, lambda _: wide.pop(key, None)), version, weight.float()
            wide[key] = known
        return known[2]

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if (
            x.dtype != torch.bfloat16
            or x.numel() == x.shape[-1]  # one row has a kernel of its own, which is fast
            or weight.dtype != torch.bfloat16
            or weight.numel() < LARGE
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return narrow(x, weight, bias)
        bias = None if bias is None else bias.float()
        return narrow(x.float(), widened(weight), bias).to(torch.bfloat16)

    linear.wide = wide  # type: ignore[attr-defined]
    torch.nn.functional.linear = linear
