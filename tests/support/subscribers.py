"""A router's end of vLLM's KV events, decoded by vLLM's own classes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

_decode = msgspec.msgpack.Decoder(KVEventBatch).decode


class Subscriber:
    """Has all batches replayed, from the first one on.

    Args:
        folder: for the sockets' paths.
    """

    def __init__(self, folder: Path) -> None:
        self.config = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=f"ipc://{folder}/events",
            replay_endpoint=f"ipc://{folder}/replay",
        )
        self._context = zmq.Context()

    def batches(self) -> list[tuple[int, KVEventBatch]]:
        """All of them, by their numbers."""
        found: list[tuple[int, KVEventBatch]] = []
        with self._context.socket(zmq.DEALER) as replay:
            replay.setsockopt(zmq.LINGER, 0)
            replay.setsockopt(zmq.RCVTIMEO, 20_000)
            replay.connect(self.config.replay_endpoint)
            replay.send_multipart([b"", (0).to_bytes(8, "big")])
            while True:
                _, _, number, payload = replay.recv_multipart()
                if number == ZmqEventPublisher.END_SEQ:
                    return found
                found.append((int.from_bytes(number, "big"), _decode(payload)))

    def events(self, *media: str) -> list[Any]:
        """All events of these media, in order; those of all media, too."""
        batches = self.batches()
        assert [number for number, _ in batches] == list(range(len(batches)))
        return [
            event
            for _, batch in batches
            for event in batch.events
            if isinstance(event, AllBlocksCleared) or event.medium in media
        ]

    def known(self, medium: str) -> dict[Any, list[int]]:
        """What a router knows to be in a medium: a block's tokens by its hash."""
        known: dict[Any, list[int]] = {}
        for event in self.events(medium):
            match event:
                case BlockStored():
                    assert event.parent_block_hash is None or event.block_size
                    for i, one in enumerate(event.block_hashes):
                        start = i * event.block_size
                        known[one] = list(event.token_ids[start : start + event.block_size])
                case BlockRemoved():
                    for one in event.block_hashes:
                        known.pop(one, None)
                case AllBlocksCleared():
                    known.clear()
        return known

    def close(self) -> None:
        self._context.destroy(linger=0)


def until(true: Callable[[], Any], step: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Have the engine make steps until it is true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        step()
        time.sleep(0.02)
