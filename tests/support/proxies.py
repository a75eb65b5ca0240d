"""A proxy before two engines' HTTP sides, and a client of it; for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from tests.support.stand_ins import StandIn, until

from kvstrata.proxy.apart import Apart
from kvstrata.proxy.routed import Routed
from kvstrata.proxy.server import Proxy, serve
from kvstrata.proxy.way import Way
from kvstrata.routing import POLICIES

BODY = 600
"""Bytes of a body, where a test says nothing else."""


class Place:
    """Two engines, a proxy before them, and a client of it."""

    def __init__(self, engines: list[StandIn], proxy: Proxy, port: int) -> None:
        self.engines, self.proxy, self.port = engines, proxy, port
        self.session = aiohttp.ClientSession(f"http://127.0.0.1:{port}")

    async def ask(self, length: int = BODY, **more: Any) -> tuple[int, str]:
        """Send a body of so many bytes."""
        body = {"prompt": "", **more}
        body["prompt"] = "x" * (length - len(json.dumps(body)))
        data = json.dumps(body).encode()
        async with self.session.post("/v1/completions", data=data) as response:
            return response.status, await response.text()

    def asked(self) -> int:
        """Requests that came to the engines."""
        return sum(len(engine.asked) for engine in self.engines)

    @asynccontextmanager
    async def sending(self, nbytes: int) -> AsyncIterator[asyncio.StreamReader]:
        """A request of whose body one byte is missing; what is answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {nbytes + 1}\r\n\r\n"
        writer.write(head.encode() + b" " * nbytes)
        try:
            yield reader
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def routed(urls: list[str]) -> Way:
    """Before whole engines, in turn."""
    return Routed(urls, POLICIES["round-robin"]())


def apart(urls: list[str]) -> Way:
    """Before one that computes and one that decodes."""
    return Apart(urls[:1], urls[1:])


def behind_a_proxy(
    test: Callable[[Place], Coroutine[Any, Any, None]],
    way: Callable[[list[str]], Way] = routed,
) -> None:
    """Run a test; afterwards nothing is left of its requests."""

    async def main() -> None:
        first, second = StandIn(), StandIn()
        async with first.running(), second.running():
            proxy = Proxy(way([first.url, second.url]))
            runner = await serve(proxy, "127.0.0.1", 0)
            place = Place([first, second], proxy, runner.addresses[0][1])
            try:
                await asyncio.wait_for(test(place), 60)
                await until(lambda: proxy.bodies.held_bytes == 0)
            finally:
                await place.session.close()
                await runner.cleanup()

    asyncio.run(main())
