"""How soon a tier gives KV back with one codec and with another, tried before it matters."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from kvstrata.codecs import codec_named
from kvstrata.codecs.elements import from_float32
from kvstrata.node.background import Threads
from kvstrata.node.recoding import encoded_object, restored_object
from kvstrata.node.scratch import Scratch
from kvstrata.objects import HEADER_BYTES, NO_PARENT, ObjectHeader, checksum
from kvstrata.tiers.base import Outcome, Tier

SHAPE = (8, 2, 2, 128, 64)
"""Of the KV of an object, [L, S, H, T, D]: half a megabyte in bfloat16."""
NBYTES = HEADER_BYTES + 2 * math.prod(SHAPE)
PATIENCE_S = 0.2


def trial(
    tier: Tier,
    fetch: Callable[[bytes, memoryview], Outcome],
    codecs: Sequence[str],
    num_threads: int,
) -> dict[str, float]:
    """Seconds until the same KV is back, by the codec that stored it; `inf` where it did not come.

    Objects of no chunk are written, then read and decoded in all threads at once, codec by codec
    in turns, so that whatever keeps the machine busy slows each of them; and deleted. The fastest
    of several rounds counts. Blocks.

    Args:
        tier: what is tried; it holds half a megabyte for each codec meanwhile.
        fetch: reads one object of it, by its id and into a buffer.
        codecs: by name.
        num_threads: that the tier is read with.
    Raises:
        TierUnavailable: from the tier.
    """
    scratch = Scratch(2 * num_threads)
    threads = Threads(num_threads, f"kvstrata-{tier.name}-trial")
    best = dict.fromkeys(codecs, math.inf)
    stored: dict[str, tuple[bytes, int]] = {}

    def bring(object_id: bytes, nbytes: int) -> bool:
        with ExitStack() as stack:
            into = stack.enter_context(scratch.buffer(NBYTES))
            data = into if nbytes == NBYTES else stack.enter_context(scratch.buffer(nbytes))
            if fetch(object_id, data) is not Outcome.HIT:
                return False
            restored_object(data, object_id, into)
            return True

    try:
        for name in codecs:
            with scratch.buffer(NBYTES) as raw:
                object_id = _fill(raw, tier.epoch)
                encoded = encoded_object(codec_named(name), raw, scratch)
                data = raw if encoded is None else encoded.data
                stored[name] = object_id, len(data)
                tier.write([(object_id, data)])
        began = time.monotonic()
        while True:
            for name, one in stored.items():
                start = time.monotonic()
                calls = [threads.submit(partial(bring, *one)) for _ in range(2 * num_threads)]
                if all([call.result() for call in calls]):
                    best[name] = min(best[name], time.monotonic() - start)
            if time.monotonic() > began + PATIENCE_S:
                return best
    finally:
        threads.close()
        tier.delete([object_id for object_id, _ in stored.values()])


def _fill(raw: memoryview, epoch: int) -> bytes:
    """Make an object of numbers like those of KV, normal and every channel of its own size."""
    rng = np.random.default_rng(0)
    size = np.exp2(rng.integers(-3, 4, (*SHAPE[:3], 1, SHAPE[4]))).astype(np.float32)
    words = np.frombuffer(raw, np.uint16, offset=HEADER_BYTES).reshape(SHAPE)
    from_float32(rng.standard_normal(SHAPE, np.float32) * size, "bfloat16", words)
    nbytes, digest = NBYTES - HEADER_BYTES, checksum(raw[HEADER_BYTES:])
    header = ObjectHeader(
        namespace=bytes(32), key=os.urandom(32), parent=NO_PARENT, start=0, num_tokens=SHAPE[3],
        group=0, rank=0, kind="portable", order="", dtype="bfloat16", shape=SHAPE, codec="raw",
        codec_parameters=b"", epoch=epoch, created_ns=time.time_ns(), raw_length=nbytes,
        stored_length=nbytes, raw_checksum=digest, stored_checksum=digest,
    )  # fmt: skip
    raw[:HEADER_BYTES] = header.encode()
    return header.object_id
