"""What the benchmarks of the node ask it for, and how they print what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvstrata.objects import stored_bytes
from kvstrata.parts import identity
from kvstrata.tiers.disk.scan import file_name
from kvstrata.wire import protocol as p

SEED = 1
NUM_KEYS = 782
RAW = 4000
SLOT = stored_bytes(RAW)
NAMESPACE = bytes(32)
ORDER = "bench/order"
TEMPLATE = p.Template("native", ORDER, "bfloat16", [RAW // 2], 128, RAW)


def row(what: str, measured: str, target: str) -> None:
    print(f"{what} | {measured} | {target}", flush=True)


def random_keys(count: int, seed: int) -> list[bytes]:
    data = np.random.default_rng(seed).bytes(32 * count)
    return [data[i : i + 32] for i in range(0, len(data), 32)]


def fill_folder(folder: Path, count: int) -> None:
    """What an earlier process left: names of the right form (a scan reads no file)."""
    for key in random_keys(count, SEED):
        shard = folder / "objects" / key[:1].hex()
        shard.mkdir(parents=True, exist_ok=True)
        with open(shard / file_name(identity(key, 0), SLOT, 0), "wb") as file:
            file.truncate(SLOT)
