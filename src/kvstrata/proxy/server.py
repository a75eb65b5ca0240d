"""The proxy's own HTTP side: completions, health, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from kvstrata.proxy.engines import Engine, Engines, watch
from kvstrata.proxy.exchange import Answer, EngineFailed, Exchange, Refused

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
RETRY_AFTER_S = 1
FORWARDED = ("Authorization", "X-Request-Id", "X-Session-Id", "traceparent", "tracestate")
"""Headers of a client's that engines get."""


class Proxy:
    """Answers clients with the help of engines.

    Args:
        prefill: URLs of the engines that compute prompts.
        decode: URLs of those that go on with them.

    Raises:
        ConfigError: one of them is no URL of an engine.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        self.prefill = Engines([Engine(url) for url in prefill])
        self.decode = Engines([Engine(url) for url in decode])
        self.outcomes: Counter[str] = Counter()
        self._session: aiohttp.ClientSession

    def app(self) -> web.Application:
        """What an HTTP server runs."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.cleanup_ctx.append(self._life)
        return app

    @property
    def engines(self) -> list[Engine]:
        """All of them."""
        return [*self.prefill, *self.decode]

    async def _life(self, app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            watching = asyncio.ensure_future(watch(self.engines, self._session))
            yield
            watching.cancel()
            await asyncio.wait({watching})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except (ValueError, UnicodeDecodeError) as error:
            return self._refuse(400, f"the body is no JSON: {error}")
        if not isinstance(body, dict):
            return self._refuse(400, "the body is no JSON object")
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        headers.setdefault("X-Request-Id", uuid.uuid4().hex)
        exchange = Exchange(self._session, request.path, body, headers)
        try:
            answer, how = await self._answer(exchange)
        except EngineFailed as error:
            logger.error("a request fails: %s", error)
            return self._refuse(503, "no engine could answer; try again")
        try:
            self.outcomes[how if answer.status < 400 else "refused"] += 1
            return await self._relay(request, exchange, answer)
        finally:
            answer.close()

    async def _answer(self, exchange: Exchange) -> tuple[Answer, str]:
        """The beginning of an answer, and how it came about.

        Raises:
            EngineFailed: nobody could.
        """
        prefill, decode = self.prefill.next(), self.decode.next()
        failed: set[Engine] = set()
        if prefill is not None and decode is not None:
            try:
                return await exchange.split(prefill, decode), "split"
            except Refused as error:
                return error.answer, "split"
            except EngineFailed as error:
                logger.warning("a request goes on whole: %s", error)
                failed.add(error.engine)
        engine = None if decode in failed else decode
        while engine := engine or self.decode.next(failed) or self.prefill.next(failed):
            try:
                return await exchange.whole(engine), "whole"
            except EngineFailed as error:
                logger.warning("a request goes on elsewhere: %s", error)
                failed.add(engine)
                engine = None
        raise EngineFailed(self.engines[0], "and no other engine is up")

    async def _relay(
        self, request: web.Request, exchange: Exchange, answer: Answer
    ) -> web.StreamResponse:
        """Pass an answer on as it comes; one that breaks off ends with an error of its own."""
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": answer.content_type}
        )
        await response.prepare(request)
        try:
            async for piece in answer.pieces():
                await response.write(piece)
        except EngineFailed as error:
            logger.error("an answer breaks off: %s", error)
            self.outcomes["broken off"] += 1
            event = {"error": _error(503, "the engine was lost in the middle; try again")}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write_eof()
        return response

    async def _models(self, request: web.Request) -> web.StreamResponse:
        for engine in self.engines:
            try:
                async with self._session.get(engine.url / "v1" / "models") as response:
                    return web.Response(
                        body=await response.read(),
                        status=response.status,
                        content_type="application/json",
                    )
            except (aiohttp.ClientError, OSError):
                continue
        return self._refuse(503, "no engine is up; try again")

    async def _health(self, request: web.Request) -> web.Response:
        engines = {str(engine.url): engine.up for engine in self.engines}
        return web.json_response({"engines": engines}, status=200 if any(engines.values()) else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = ["# TYPE kvstrata_proxy_requests_total counter"]
        for outcome, count in sorted(self.outcomes.items()):
            lines.append(f'kvstrata_proxy_requests_total{{outcome="{outcome}"}} {count}')
        lines.append("# TYPE kvstrata_proxy_engine_up gauge")
        for engine in self.engines:
            lines.append(f'kvstrata_proxy_engine_up{{engine="{engine.url}"}} {int(engine.up)}')
        lines.append("# TYPE kvstrata_proxy_engine_failures_total counter")
        for engine in self.engines:
            lines.append(
                f'kvstrata_proxy_engine_failures_total{{engine="{engine.url}"}} {engine.num_failed}'
            )
        return web.Response(text="\n".join(lines) + "\n")

    def _refuse(self, status: int, why: str) -> web.Response:
        self.outcomes["failed" if status >= 500 else "refused"] += 1
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return web.json_response({"error": _error(status, why)}, status=status, headers=headers)


def _error(status: int, why: str) -> dict[str, Any]:
    kind = "engine_failed" if status >= 500 else "invalid_request_error"
    return {"message": why, "type": kind, "code": status}


async def serve(proxy: Proxy, host: str, port: int) -> web.AppRunner:
    """Listen; `cleanup` on the runner ends it.

    Raises:
        OSError: one cannot listen there.
    """
    runner = web.AppRunner(proxy.app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner
