"""Methods as others published them, measured beside ours; no tier can name them."""

from __future__ import annotations

from kvstrata.codecs.base import Codec
from kvstrata.codecs.quantized import Quantized

BASELINES: dict[str, Codec] = {
    f"kivi{bits}": Quantized(bits=bits, key_group=32, value_group=32, sinks=0, fit=False)
    for bits in (4, 2)
}
"""Plain KIVI (arXiv:2402.02750): ranges from the smallest to the largest of a group of 32, no
exact tokens. Its window of recent tokens is left out: it lies behind what a cache stores."""
