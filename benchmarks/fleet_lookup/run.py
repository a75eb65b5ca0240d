"""How long does a fleet take to say which nodes have how much of a prompt?"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.common import Options, Row, expect, main, say

from kvstrata.fleet import holdings
from kvstrata.fleet.members import Holding, Member
from kvstrata.fleet.registry import Registry
from kvstrata.testing.servers.redis import RedisServer
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.client import Client

NAME = "fleet_lookup"
NODES = 8
TOKENS, CHUNK_TOKENS = 100_000, 128
CHUNKS = -(-TOKENS // CHUNK_TOKENS)
KEYS = 1_000_000
HOST_SHARE = 5
"""One key in so many is in host memory, too."""
SLICE = 4000
REQUIRED_S = 0.010


def measure(options: Options) -> list[Row]:
    """The rows of this benchmark."""
    rng = np.random.default_rng(options.seed)
    total, rounds = (KEYS // 10, 100) if options.quick else (KEYS, 1000)
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        server = RedisServer(folder / "registry")
        ends.callback(server.close)
        registry = Registry(Client(parse_address(server.url), 4, 2.0), "kvstrata")
        ends.callback(registry.close)
        prompt = [rng.bytes(32) for _ in range(CHUNKS)]
        rows = []
        for what, shares in (
            ("each node has another share of it", [i * CHUNKS // NODES for i in range(NODES)]),
            ("every node has all of it", [CHUNKS] * NODES),
        ):
            with server.admin() as client:
                client.flushall()
            fill(registry, rng, prompt, shares, total // NODES)
            took = []
            for _ in range(rounds):
                begun = time.perf_counter()
                found = holdings.lookup(registry, prompt)
                took.append(time.perf_counter() - begun)
                counts = {one.member.name: len(one.tiers) for one in found}
                want = {f"node-{i}": share for i, share in enumerate(shares) if share}
                expect(counts == want, f"the registry says {counts}, it is {want}")
            p50, p99 = (float(np.percentile(took, q)) for q in (50, 99))
            say(f"{what}: p50 {1e3 * p50:.2f} ms, p99 {1e3 * p99:.2f} ms")
            detail = f"p50 {1e3 * p50:.2f} ms, {rounds} lookups of {CHUNKS} chunks, {total} keys"
            rows.append(
                Row(
                    NAME,
                    f"fleet lookup of 100,000 tokens, p99; {what}",
                    1e3 * p99,
                    1e3 * REQUIRED_S,
                    unit="ms",
                    detail=detail,
                )
            )
        with server.admin() as client:
            used = client.info("memory")["used_memory"] / (total * (1 + 1 / HOST_SHARE))
        rows.append(Row(NAME, "the registry's memory for a chunk in a tier", used, None, unit="B"))
    return rows


def fill(
    registry: Registry,
    rng: np.random.Generator,
    prompt: list[bytes],
    shares: list[int],
    per_node: int,
) -> None:
    """Have each node hold so many leading chunks of the prompt, and others."""
    for number, share in enumerate(shares):
        tiers = [Holding("host"), Holding("disk")]
        member = Member(f"node-{number}", 1, "0", 2, 1, tiers=tiers)
        registry.renew(member, 3600.0, None)
        for tier, count, having in (
            ("host", per_node // HOST_SHARE, share // HOST_SHARE),
            ("disk", per_node, share),
        ):
            ids = [holdings.id_of(key, 0) for key in prompt[:having]]
            ids += [rng.bytes(holdings.ID_BYTES) for _ in range(count - having)]
            key = registry.names.held(member.name, member.boot, tier)
            for start in range(0, len(ids), SLICE):
                with registry.call():
                    registry.run("SADD", key, *ids[start : start + SLICE])


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
