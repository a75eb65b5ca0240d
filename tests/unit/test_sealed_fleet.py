"""A shared tier with encryption: a store that others may write to, and fleets of several keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.fleets import Fleet, FleetTier, make_member
from tests.support.nodes import (
    chunk_keys,
    flush,
    payload,
    until,
)
from tests.support.sealed import (
    CORRUPT,
    KEY,
    MISSES,
    NUM,
    OTHER,
    WHOLE,
    counted,
    get,
    memory,
    put,
    tampered,
)

from kvstrata.codecs import codec_named
from kvstrata.node.coding.choosing import Always
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, stored_bytes


class TestShared:
    """A store that a fleet shares, and others may write to."""

    def run(
        self,
        test: Callable[..., Coroutine[Any, Any, None]],
        *keys: bytes | None,
        codec: str = "raw",
    ) -> None:
        """With a node for each key; None: one without."""

        async def main() -> None:
            fleet = Fleet(lasts_s=5.0)
            choice = None if codec == "raw" else Always(codec_named(codec))
            nodes = [
                make_member(
                    FleetTier(fleet), choice=choice, keys=None if key is None else KeyRing([key])
                )
                for key in keys
            ]
            for node in nodes:
                await node.start()
            try:
                await until(lambda: all(node.backings[0].readable for node in nodes))
                await asyncio.wait_for(test(fleet, *nodes), 30)
                for node in nodes:
                    node.check_integrity()
            finally:
                for node in nodes:
                    await node.stop(drain_s=1.0)

        asyncio.run(main())

    @pytest.mark.parametrize("codec", ["raw", "lossless"])
    def test_what_one_stored_another_gets(self, codec: str) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(NUM)
            put(a, keys)
            await flush(a, Client("pid 1"))
            everything = b"".join(bytes(one.data) for one in fleet.objects._objects.values())
            for key in keys:
                data = payload(key, nbytes=WHOLE)
                assert not any(data[i : i + 16] in everything for i in range(0, WHOLE, 512))
            assert await get(b, keys) == NUM
            assert await get(a, keys) == NUM

        self.run(test, KEY, KEY, codec=codec)

    @pytest.mark.parametrize(
        ("writer", "reader"), [(KEY, OTHER), (KEY, None), (None, KEY)], ids=str
    )
    def test_what_is_not_for_a_node_is_a_counted_miss_and_stays(
        self, writer: bytes | None, reader: bytes | None
    ) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(1)
            put(a, keys)
            await flush(a, Client("pid 1"))
            assert await get(b, keys) == 0
            assert counted(b, MISSES, "fleet") == 1
            assert await get(b, keys) == 0
            assert counted(b, MISSES, "fleet") == 1, "it is not read again so soon"
            assert await get(a, keys) == 1

        self.run(test, writer, reader)

    def test_what_was_tampered_with_goes(self) -> None:
        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(1)
            put(a, keys)
            await flush(a, Client("pid 1"))
            (name,) = fleet.names
            old = fleet.objects._objects[name]
            data = np.frombuffer(tampered(bytes(old.data)), np.uint8)
            fleet.objects._objects[name] = replace(old, data=data)
            assert await get(b, keys) == 0
            assert counted(b, CORRUPT, "fleet") == 1
            await until(lambda: not fleet.names)
            put(b, keys)
            await flush(b, Client("pid 1"))
            assert await get(a, keys) == 1

        self.run(test, KEY, KEY)

    def test_a_size_that_was_only_guessed_is_no_bound(self) -> None:
        """As of a chunk that a gallop found among smaller ones."""

        async def test(fleet: Fleet, a: Node, b: Node) -> None:
            keys = chunk_keys(1)
            put(a, keys)
            await flush(a, Client("pid 1"))
            assert await get(b, keys) == 1
            into = memory(stored_bytes(WHOLE))
            assert await b.backings[0].read(keys[0], 0, HEADER_BYTES, into) is not None
            assert into[HEADER_BYTES:] == payload(keys[0], nbytes=WHOLE)

        self.run(test, KEY, KEY)
