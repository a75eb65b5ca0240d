"""Does a storm of other tenants cost one what is pinned, or get one past its quota?"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, disk_folder, expect, main

from kvstrata.config import load_config
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.objects import HEADER_BYTES, checksum, stored_bytes
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.operator import Operator

NAME = "tenants"
PAYLOAD_BYTES = 60 << 10
OBJECT_BYTES = stored_bytes(PAYLOAD_BYTES)
HOST_CHUNKS, DISK_CHUNKS, PINNED_CHUNKS = 128, 256, 48
QUOTA = {"host": 20 * OBJECT_BYTES, "disk": 40 * OBJECT_BYTES}
PROMPT_CHUNKS = 16
NUM_OTHERS = 3
ORDER = "portable"
WAIT_S = 60.0
DISK_EVICTED = 'evicted_chunks_total{tier="disk"}'


class Tenant:
    """One tenant, with a connection of its own.

    Args:
        client: the connection.
        number: of the tenant.
        seed: of its bytes.
    """

    def __init__(self, client: NodeClient, number: int, seed: int) -> None:
        self.client = client
        self.owner = bytes([number]) * 16
        self.namespace = bytes([number]) * 32
        self._random = np.random.default_rng([seed, number])

    def store(self, num_chunks: int) -> dict[bytes, bytes]:
        """Store a new prompt, as far as there is room; its keys and payloads."""
        form = p.Template("portable", "", "uint8", [PAYLOAD_BYTES], 128, PAYLOAD_BYTES)
        chunks = {self._random.bytes(32): self._random.bytes(PAYLOAD_BYTES)
                  for _ in range(num_chunks)}  # fmt: skip
        call = self.client.reserve(self.namespace, list(chunks), 0, 0, form, owner=self.owner)
        reserved: p.Reserved = call.wait(WAIT_S)
        sums = []
        for offset, data in zip(offsets_of(reserved.offsets), chunks.values(), strict=True):
            if offset >= 0:
                view = self.client.pool.view(offset + HEADER_BYTES, PAYLOAD_BYTES)
                view[:] = data
                del view
            sums.append(checksum(data) if offset >= 0 else bytes(16))
        self.client.commit(reserved.reservation, sums).wait(WAIT_S)
        return chunks

    def lost(self, chunks: dict[bytes, bytes]) -> int:
        """Bytes of these chunks that do not come back as they were stored."""
        lost = 0
        for key, data in chunks.items():
            call = self.client.match([key], [0], [ORDER], [PAYLOAD_BYTES], self.owner)
            matched: p.Matched = call.wait(WAIT_S)
            found = b""
            if matched.lease:
                arrived: p.Arrived = self.client.await_arrival(matched.lease, 0).wait(WAIT_S)
                if arrived.ready:
                    (offset,) = offsets_of(arrived.offsets)
                    found = bytes(self.client.pool.view(offset + HEADER_BYTES, PAYLOAD_BYTES))
                self.client.release(matched.lease)
            lost += (found != data) * PAYLOAD_BYTES
        return lost


def beyond(status: dict[str, Any], owner: bytes) -> int:
    """By how many bytes a tenant is beyond its quota, in all tiers together."""
    total = 0
    tiers = {"host": status["host"], **{one["name"]: one for one in status["tiers"]}}
    for name, quota in QUOTA.items():
        for one in tiers[name]["owners"]:
            if one["owner"] == owner.hex():
                expect(one["quota_bytes"] == quota, f"{name} has another quota")
                total += max(0, one["bytes"] - quota)
    return total


def storm(folder: Path, prompts: int, seed: int) -> tuple[int, int, dict[str, float]]:
    """Let all of them store so many prompts; pinned bytes lost, most bytes beyond a quota, counts.

    Args:
        folder: for the disk tier.
        prompts: that each of the others stores.
        seed: of all bytes.
    """
    overrides = {
        "host.capacity": HOST_CHUNKS * OBJECT_BYTES,
        "disk.path": str(folder / "disk"),
        "disk.capacity": DISK_CHUNKS * OBJECT_BYTES,
        "disk.codec": "raw",
        "pins.per_tenant": "25%",
        "canary": "off",
    }
    config = load_config(environ={"XDG_CONFIG_HOME": str(folder)}, overrides=overrides)
    with InProcessNode(config) as node, ThreadPoolExecutor(NUM_OTHERS + 2) as threads:
        clients = [node.connect() for _ in range(NUM_OTHERS + 3)]
        try:
            tenants = [Tenant(one, number, seed) for number, one in enumerate(clients, 1)]
            pinned, greedy, *others, watcher = tenants
            operator = Operator(watcher.client, WAIT_S)
            for tier, nbytes in QUOTA.items():
                operator.quota(greedy.owner, tier, nbytes)
            kept = pinned.store(PINNED_CHUNKS)
            watcher.client.flush(WAIT_S)  # host memory alone has not room for so many pins
            told = operator.pin(list(kept), pinned.owner, "kept", 3600.0)
            expect(told.num_kept == PINNED_CHUNKS, f"{told.num_kept} chunks are kept")
            ended = threading.Event()
            most = threads.submit(_watch, watcher.client, greedy.owner, ended)
            works = [threads.submit(_many, one, prompts) for one in (greedy, *others)]
            for work in works:
                work.result()
            watcher.client.flush(WAIT_S)
            ended.set()
            node.check_integrity()
            lost = pinned.lost(kept)
            status = watcher.client.status()
            return lost, most.result(), {
                "evicted": status["host"]["num_evicted"],
                **{name: count for name, count in status["counters"].items()
                   if name.startswith(("over_quota", "evicted"))},
            }  # fmt: skip
        finally:
            for client in clients:
                client.close()


def _many(tenant: Tenant, prompts: int) -> None:
    for number in range(prompts):
        tenant.store(PROMPT_CHUNKS)
        if number % 4 == 0:  # or else most of it would not get as far as the disk
            tenant.client.flush(WAIT_S)


def _watch(client: NodeClient, owner: bytes, ended: threading.Event) -> int:
    most = beyond(client.status(), owner)
    while not ended.wait(0.01):
        most = max(most, beyond(client.status(), owner))
    return most


def measure(options: Options) -> list[Row]:
    """Both rows."""
    prompts = 100 if options.quick else 1000
    with disk_folder(options) as folder:
        place = Path(tempfile.mkdtemp(dir=folder))
        lost, over, counts = storm(place, prompts, options.seed)
    written = (1 + NUM_OTHERS) * prompts * PROMPT_CHUNKS * OBJECT_BYTES
    host, disk = counts["evicted"], counts[DISK_EVICTED]
    detail = (
        f"{written / 1e9:.1f} GB of {1 + NUM_OTHERS} tenants; evicted from host memory {host:.0f} "
        f"chunks, from disk {disk:.0f}; {os.cpu_count()} cores"
    )
    return [
        Row(NAME, "pinned bytes lost in a storm of other tenants", lost, 0, unit="B",
            detail=detail),
        Row(NAME, "a tenant's bytes beyond its quota, at most", over, 0, unit="B", detail=detail),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
