"""How fast every codec is on one core, and how much smaller it makes real KV."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from benchmarks.common import CHUNK_TOKENS, Options, Prompts, Row, expect, main, say, spread

from kvstrata.codecs import CODECS, Codec
from kvstrata.codecs.base import Payload
from kvstrata.codecs.framing import decode, encode, encoded_bound
from kvstrata.errors import LayoutMismatch
from kvstrata.layout import Bytes
from kvstrata.quality.coding import chunk
from kvstrata.quality.models import Model

NAME = "codecs"
TOKENS = 2048
Chunks = list[tuple[Payload, Bytes]]

#: ratio, encode GB/s, decode GB/s; the other codecs' bounds go with their quality: docs/quality.md
BOUNDS: dict[str, tuple[float, float, float]] = {"lossless": (1.45, 0.6, 1.0)}


def real_chunks(options: Options) -> Chunks:
    """Chunks of 128 tokens from all over a document that SmolLM2 has read."""
    import torch

    torch.set_num_threads(1)
    prompts = Prompts(options.seed)
    kv = Model(prompts.model).prefill(prompts.make(1, tokens=TOKENS)[0][:TOKENS])
    step = 4 if options.quick else 1
    return [chunk(kv, start) for start in range(0, TOKENS, step * CHUNK_TOKENS)]


def measure(options: Options) -> list[Row]:
    """Every registered codec over all chunks, in turns, so that a slow minute hits them all."""
    chunks = real_chunks(options)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    total = sum(payload.nbytes for payload, _ in chunks)
    sizes: dict[str, int] = {}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in CODECS}
    for number in range(3 if options.quick else 8):
        for name, codec in CODECS.items():
            try:
                sizes[name], encoding, decoding = one_round(codec, chunks)
            except LayoutMismatch as error:
                say(f"{name}: {error}")
                continue
            if number:  # the first round compiles and warms up
                speeds[name].append((total / encoding / 1e9, total / decoding / 1e9))
    rows = []
    for name in sizes:
        ratio, bounds = total / sizes[name], BOUNDS.get(name, (None, None, None))
        rows.append(Row(NAME, f"{name}: times smaller", ratio, bounds[0], at_most=False))
        for i, verb in enumerate(("encode", "decode")):
            found = spread(pair[i] for pair in speeds[name])
            rows.append(
                Row(
                    NAME, f"{name}: {verb} a core", found.median, bounds[1 + i], at_most=False,
                    unit="GB/s", detail=f"of raw KV; {found}",
                )
            )  # fmt: skip
        say(f"{name:<14} {ratio:6.3f} x, " + ", ".join(f"{r.measured:.2f} GB/s" for r in rows[-2:]))
    return rows


def one_round(codec: Codec, chunks: Chunks) -> tuple[int, float, float]:
    """Encoded bytes, and processor seconds to encode and to decode all chunks.

    The thread's own time: what else runs on the machine is not counted.
    """
    payload = chunks[0][0]
    encoded = np.ones(encoded_bound(codec, payload), np.uint8)
    out = np.ones(payload.nbytes, np.uint8)
    sizes, encoding, decoding = 0, 0.0, 0.0
    for payload, raw in chunks:
        began = time.thread_time()
        size = encode(codec, payload, raw, encoded)
        between = time.thread_time()
        decode(codec, payload, encoded[:size], out)
        decoding += time.thread_time() - between
        encoding += between - began
        sizes += size
        if codec.lossless:
            expect(np.array_equal(raw, out), f"{codec.name} did not give back every bit")
    return sizes, encoding, decoding


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
