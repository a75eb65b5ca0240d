"""Engines' HTTP sides, on real sockets, that fail in every way they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from kvstrata.connectors.naming import decode_elsewhere

PEER = "127.0.0.1:7788"
CHECK = "3a125131a5f428cc"


class StandIn:
    """An engine's HTTP side. What it does is set from outside.

    ``fails``: how it treats a request, empty: it answers. ``open``: requests wait for it.
    ``awake``: its health does. ``metrics``: what it says of itself. ``says``: headers of its
    answers.
    """

    def __init__(self) -> None:
        self.fails = ""
        self.health = 200
        self.open = asyncio.Event()
        self.open.set()
        self.awake = asyncio.Event()
        self.awake.set()
        self.metrics = b""
        self.says: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.gone = 0  # clients that left before their answer
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(request.headers)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.gone += 1
            raise
        if self.fails == "dies":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.fails.isdigit():
            error = {"error": self.fails}
            return web.json_response(error, status=int(self.fails), headers=self.says)
        if self.fails == "nonsense":
            return web.Response(body=b"\xff\xff")
        if body.get("stream"):
            return await self._stream(request)
        answer: dict[str, Any] = {"text": "whole"}
        if (body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            answer["kv_transfer_params"] = decode_elsewhere(PEER, b"n", "r", 5, 1, CHECK)
        return web.json_response(answer, headers=self.says)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.fails == "never ends":
            await self._forever(response)
        for number in range(3):
            await response.write(f"data: {number}\n\n".encode())
            if self.fails == "silent in the middle":
                await self._forever()
            if self.fails == "dies in the middle":
                await asyncio.sleep(0.05)
                assert request.transport is not None
                request.transport.abort()
                return response
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _forever(self, response: web.StreamResponse | None = None) -> None:
        """Until the client goes: say nothing, or much."""
        try:
            while response is not None:
                await response.write(bytes(1 << 16))
            await asyncio.Event().wait()
        except (asyncio.CancelledError, ConnectionError):
            self.gone += 1
            raise

    async def answer_health(self, request: web.Request) -> web.Response:
        await self.awake.wait()
        return web.Response(status=self.health)

    async def answer_models(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        return web.json_response({}, status=self.health)

    async def answer_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StandIn]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/health", self.answer_health)
        app.router.add_get("/v1/models", self.answer_models)
        app.router.add_get("/metrics", self.answer_metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")
