"""How fast SGLang's pages come out of a node and go into it, beside a plain copy on one core, and
how long it takes to ask for many."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks.common import Options, Row, expect, main, milliseconds, say, spread

from kvstrata.connectors.sglang.holds import Holds
from kvstrata.connectors.sglang.loads import Loads
from kvstrata.connectors.sglang.lookups import Lookups
from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.pages import KV, TokenPages
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.proof import prove
from kvstrata.connectors.sglang.renewals import Generation
from kvstrata.connectors.sglang.stats import Tally
from kvstrata.connectors.sglang.stores import Stores
from kvstrata.keys import Namespace
from kvstrata.testing.workplace import Workplace, wait_ready
from kvstrata.wire.client import NodeClient

NAME = "sglang_pages"
LAYOUTS = ("page_first_direct", "page_first", "layer_first")
PAGE_TOKENS = 128
PATIENCE_S = 60.0
#: of one prompt; several prompts lie in the pool, so that no cache holds what was copied
PROMPT_BYTES, NUM_PROMPTS = 80 << 20, 5
NUM_ASKED = 2048
LOAD_BOUND, STORE_BOUND, ASK_BOUND_MS = 0.70, 0.40, 10.0


class Shape(NamedTuple):
    """What a token has, in bfloat16."""

    name: str
    layers: int
    heads: int
    dim: int
    page_tokens: int = PAGE_TOKENS

    @property
    def page_bytes(self) -> int:
        return 2 * 2 * self.layers * self.heads * self.dim * self.page_tokens


SHAPES = (Shape("SmolLM2", 30, 3, 64), Shape("Llama 8B", 32, 8, 128))
#: so small that all that is asked for fits; a question has no bytes of KV in it
SMALL = Shape("small", 1, 1, 16, 16)


class HostPool:
    """A pool of keys and values as SGLang has it, with its views of a layer."""

    def __init__(self, shape: Shape, layout: str, pages: int) -> None:
        tokens, size = shape.page_tokens, pages * shape.page_tokens
        self.layout, self.page_size, self.size = layout, tokens, size
        self.layer_num = self.target_layer_num = shape.layers
        self.start_layer, self.dtype = 0, torch.bfloat16
        self.head_num, self.head_dim, self.v_head_dim = shape.heads, shape.dim, shape.dim
        dims = {
            "layer_first": (shape.layers, size, shape.heads, shape.dim),
            "page_first": (size, shape.layers, shape.heads, shape.dim),
            "page_first_direct": (pages, shape.layers, tokens, shape.heads, shape.dim),
        }[layout]
        self.kv_buffer = torch.ones((2, *dims), dtype=self.dtype)
        self.k_data_refs, self.v_data_refs = (
            list(one if layout == "layer_first" else one.transpose(0, 1)) for one in self.kv_buffer
        )

    @property
    def bytes(self) -> Any:
        """All of its memory."""
        return self.kv_buffer.view(torch.uint8).numpy().reshape(-1)


class Storage:
    """What a storage does behind SGLang's interface, for one pool."""

    def __init__(self, client: NodeClient, shape: Shape, layout: str, pages: int) -> None:
        rank = SimpleNamespace(pp_rank=0, tp_rank=0, tp_size=1, is_mla_model=False)
        self.client, self.pool = client, HostPool(shape, layout, pages)
        pools = Pools(rank, shape.page_tokens)
        self.pages = TokenPages(self.pool, KV, shape.page_tokens)
        prove(self.pages, self.pool)
        pools.add(self.pages)
        space = Namespace(f"{shape.name} {layout}", pools.layout, shape.page_tokens)
        names = Names(lambda generation: space, Generation())
        self.holds = Holds(PATIENCE_S, lambda hold: None)
        self.lookups = Lookups(names, pools, self.holds, "", PATIENCE_S)
        self.loads = Loads(pools, self.lookups, self.holds, Tally(), PATIENCE_S)
        self.stores = Stores(names, pools, Tally(), "", PATIENCE_S)

    def exists(self, hashes: list[str]) -> None:
        """Ask for pages that are there."""
        found = self.lookups.prefix(self.client, "", hashes, ())
        expect(found == len(hashes), f"{found} of {len(hashes)} pages are there")

    def load(self, hashes: list[str], starts: list[int]) -> None:
        """Read pages that were asked for."""
        came = self.loads.read(self.client, "", KV, hashes, starts)
        expect(came == len(hashes), f"{came} of {len(hashes)} pages were loaded")

    def store(self, hashes: list[str], starts: list[int]) -> None:
        """Write pages that are not there."""
        kept = self.stores.write(self.client, "", KV, (), hashes, starts, "")
        expect(all(kept), f"{sum(kept)} of {len(hashes)} pages were stored")


def measure(options: Options) -> list[Row]:
    """Every shape and layout, on one node in a process of its own."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    capacity = 2 * NUM_PROMPTS * (PROMPT_BYTES + (32 << 20))
    settings = {"host.capacity": str(capacity), "leases.per_client": "80%"}
    rows: list[Row] = []
    with Workplace(Path(), settings, service=True) as place, closing(place.client()) as client:
        client.pool.populate(in_background=False)
        wait_ready(client)
        rows += asked(options, client)
        for shape in SHAPES:
            for layout in LAYOUTS:
                client.clear()
                rows += copied(options, client, shape, layout)
    return rows


def asked(options: Options, client: NodeClient) -> list[Row]:
    """A question for as many pages as a long prompt has."""
    storage = Storage(client, SMALL, "page_first_direct", 128)
    hashes = made_hashes(NUM_ASKED, options.seed)
    starts = [SMALL.page_tokens * n for n in range(128)]
    for first in range(0, NUM_ASKED, 128):
        storage.stores.write(
            client, "", KV, hashes[:first], hashes[first : first + 128], starts, ""
        )
    seconds = []
    for number in range(50 if options.quick else 300):
        began = time.perf_counter()
        storage.exists(hashes)
        if number >= 10:
            seconds.append(time.perf_counter() - began)
        storage.holds.drop()
    say(milliseconds(f"exists of {NUM_ASKED} pages", seconds))
    found = spread(1e3 * each for each in seconds)
    detail = f"{found}; p99 {np.percentile(seconds, 99) * 1e3:.1f} ms"
    what = f"exists of {NUM_ASKED:,} pages"
    return [Row(NAME, what, found.median, ASK_BOUND_MS, unit="ms", detail=detail)]


def copied(options: Options, client: NodeClient, shape: Shape, layout: str) -> list[Row]:
    """Stores and loads of whole prompts, in turns with plain copies of as many pages."""
    count = PROMPT_BYTES // shape.page_bytes
    total = count * NUM_PROMPTS
    storage = Storage(client, shape, layout, total)
    noise = np.random.default_rng(options.seed).integers(0, 256, 1_048_583, np.uint8)
    storage.pool.bytes[:] = np.resize(noise, storage.pool.bytes.shape)
    kept = storage.pool.bytes.copy()
    spare = np.ones_like(kept)
    starts = [[shape.page_tokens * (first + n) for n in range(count)]
              for first in range(0, total, count)]  # fmt: skip
    speeds: dict[str, list[float]] = {"load": [], "store": [], "copy": []}

    def plain(prompt: int) -> None:
        for page in range(prompt * count, (prompt + 1) * count):
            at = page * shape.page_bytes
            ctypes.memmove(spare.ctypes.data + at, kept.ctypes.data + at, shape.page_bytes)

    def timed(what: str, work: Callable[[], None], counts: bool) -> None:
        began = time.perf_counter()
        work()
        if counts:
            speeds[what].append(count * shape.page_bytes / (time.perf_counter() - began) / 1e9)

    for number in range(4 if options.quick else 10):
        client.clear()
        prompts = [made_hashes(count, 1000 * number + prompt) for prompt in range(NUM_PROMPTS)]
        counts = number > 0  # the first round warms up
        for prompt, hashes in enumerate(prompts):
            timed("store", partial(storage.store, hashes, starts[prompt]), counts)
            timed("copy", partial(plain, prompt), counts)
        storage.pool.bytes[:] = 0
        for prompt, hashes in enumerate(prompts):
            storage.exists(hashes)
            timed("load", partial(storage.load, hashes, starts[prompt]), counts)
        expect(np.array_equal(storage.pool.bytes, kept), f"{shape.name}, {layout}: other bytes")
    say(f"{shape.name}, {layout}: " + ", ".join(
        f"{what} {spread(each).median:.2f} GB/s" for what, each in speeds.items()))  # fmt: skip
    return [
        ratio(speeds, shape, layout, what, bound)
        for what, bound in (("load", LOAD_BOUND), ("store", STORE_BOUND))
    ]


def ratio(
    speeds: dict[str, list[float]], shape: Shape, layout: str, what: str, bound: float
) -> Row:
    """A speed over that of the plain copies of the same round."""
    found = spread(ours / theirs for ours, theirs in zip(speeds[what], speeds["copy"], strict=True))
    medians = [spread(speeds[each]).median for each in (what, "copy")]
    return Row(
        NAME,
        f"{what} of pages of {shape.name}, {layout} / memcpy, one core (speed)",
        found.median,
        bound,
        at_most=False,
        detail=f"{found}; {medians[0]:.1f} of {medians[1]:.1f} GB/s",
    )


def made_hashes(count: int, seed: int) -> list[str]:
    """Names of pages as SGLang writes them."""
    return [hashlib.sha256(f"{seed} {n}".encode()).hexdigest() for n in range(count)]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
