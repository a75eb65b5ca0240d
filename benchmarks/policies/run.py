"""Replay a trace of prompts against every eviction policy and print the hit rate by token."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from kvstrata.policies import POLICIES, Policy, create_policy

BLOCK_TOKENS = 512
UNBOUNDED = 1 << 60


def always(key: bytes) -> bool:
    """Nothing is leased in a simulation."""
    return True


def replay(requests: list[tuple[int, list[int]]], policy: Policy) -> float:
    """Share of all prompt tokens that the policy still held, as a leading run of blocks."""
    hit_tokens = num_tokens = 0
    for length, hash_ids in requests:
        keys = [number.to_bytes(8, "little") for number in hash_ids]
        num_hits = next((i for i, key in enumerate(keys) if key not in policy), len(keys))
        hit_tokens += min(num_hits * BLOCK_TOKENS, length)
        num_tokens += length
        # As the node does it: room first, then tail before head, present or not.
        for key in reversed(keys):
            if key in policy:
                policy.touch(key)
                continue
            while policy.total_bytes + BLOCK_TOKENS > policy.capacity_bytes:
                policy.evict(always)
            policy.insert(key, BLOCK_TOKENS, 1.0)
    policy.check_integrity()
    return hit_tokens / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines, see the README")
    parser.add_argument(
        "--capacity",
        type=float,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="millions of tokens (default: %(default)s); unbounded is always added",
    )
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.trace.read_text().splitlines()]
    requests = [(line["input_length"], line["hash_ids"]) for line in lines]
    print(f"{'capacity':>10}", *(f"{name:>8}" for name in POLICIES))
    started = time.perf_counter()
    for millions in [*arguments.capacity, None]:
        capacity = UNBOUNDED if millions is None else int(millions * 1_000_000)
        rates = [replay(requests, create_policy(name, capacity)) for name in POLICIES]
        label = "unbounded" if millions is None else f"{millions:g}M"
        print(f"{label:>10}", *(f"{rate:8.1%}" for rate in rates))
    print(f"{len(requests)} requests, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
