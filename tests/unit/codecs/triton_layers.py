"""Layers through the kernels and through the CPU, and what differs: run by `test_triton_kernels`.

``python -m tests.unit.codecs.triton_layers DEVICE`` prints, for each case, "same" or what differs,
as JSON. It is a process of its own, because TRITON_INTERPRET is read when kernels are defined.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import numpy as np
import torch

from kvstrata.codecs.base import Codec, Payload
from kvstrata.codecs.fp8 import Fp8
from kvstrata.codecs.quantized import INTEGERS, Quantized
from kvstrata.codecs.rotated import TURBO, Rotated
from kvstrata.errors import CorruptObject
from kvstrata.layout import WORDS, Bytes
from kvstrata.testing.codecs import kv_like

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NUM_BROKEN = 25


class Case(NamedTuple):
    """A layer: of numbers like those of KV, or of others, or an encoded one that was damaged."""

    codec: Codec
    payload: Payload
    numbers: str = "kv"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.payload.shape[1:]))
        where = f"{shape}-{self.payload.dtype}-from{self.payload.start}"
        return f"{self.codec.name}-{self.numbers}-{where}"


_SOME = (Fp8(), *INTEGERS, Rotated(5, 4), Rotated(3, 2))
_ODD = [
    Payload((1, 2, 1, 37, 24), "float16", 2),
    Payload((1, 1, 2, 7, 80), "float32", 128),
    Payload((1, 2, 1, 3, 40), "bfloat16"),
]
_SMALL = Payload((1, 2, 1, 16, 64), "float32", 128)

CASES = [
    *(Case(codec, Payload((1, 2, 3, 128, 64), "bfloat16")) for codec in _SOME),
    *(Case(codec, payload) for codec in (Fp8(), *INTEGERS, *TURBO) for payload in _ODD),
    *(
        Case(codec, _SMALL, numbers)
        for codec in _SOME
        for numbers in ("zeros", "largest", "smallest", "infinite", "broken")
    ),
    Case(Rotated(4, 3), Payload((1, 2, 1, 300, 16), "bfloat16")),
    Case(Rotated(2, 2), Payload((1, 1, 1, 9, 576), "bfloat16", 128)),
    Case(Quantized(2, 32, 32, 0, False), Payload((1, 2, 1, 70, 80), "bfloat16")),
    Case(Quantized(4, 16, 24, 2, True), Payload((1, 2, 1, 70, 80), "bfloat16")),
]


def numbers_of(case: Case) -> Bytes:
    """The raw bytes of the layer."""
    raw = kv_like(case.payload)
    if case.numbers in ("kv", "broken"):
        return raw
    numbers = raw.view(np.float32).copy()
    if case.numbers == "zeros":
        numbers *= 0  # of both signs
    elif case.numbers == "largest":
        numbers *= np.float32(3e38) / np.abs(numbers).max()
    elif case.numbers == "smallest":
        numbers *= np.float32(1e-42)
    else:
        numbers[77] = np.inf
    damaged: Bytes = numbers.view(np.uint8)
    return damaged


def compare(case: Case, device: str) -> str:
    """What differs: "same", "bytes", or "numbers" and where."""
    from kvstrata.codecs.triton.kernels import decode_layer, encode_layer

    codec, payload = case.codec, case.payload
    raw = numbers_of(case)
    words = raw.view(WORDS[payload.item_bytes]).reshape(payload.layer_shape)
    out = np.empty(codec.layer_bound(payload), np.uint8)
    frame = out[: codec.encode_layer(words, 0, payload, out)]
    values = torch.from_numpy(raw).view(DTYPES[payload.dtype]).reshape(payload.layer_shape)
    encoded = encode_layer(codec, values.to(device), payload).cpu().numpy()
    if encoded.tobytes() != frame.tobytes():
        return "bytes"
    rng = np.random.default_rng(0)
    for turn in range(NUM_BROKEN if case.numbers == "broken" else 1):
        given = frame.copy()
        if case.numbers == "broken":
            given[rng.integers(0, len(given), 1 + turn)] = rng.integers(0, 256, 1 + turn)
            given = given[: len(given) - turn % 3 // 2]
        expected: bytes | None = None
        got: bytes | None = None
        try:
            back = np.empty_like(words)
            codec.decode_layer(given, 0, payload, back)
            expected = back.tobytes()
        except CorruptObject:
            pass
        try:
            numbers = decode_layer(codec, torch.from_numpy(given).to(device), payload)
            got = numbers.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        except CorruptObject:
            pass
        if got != expected:
            return f"numbers of turn {turn}"
    return "same"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, masked lanes included
        print(json.dumps({str(case): compare(case, sys.argv[1]) for case in CASES}))
