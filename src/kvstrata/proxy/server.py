"""The proxy's own HTTP side: completions, health, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvstrata import descriptors
from kvstrata.proxy.bodies import Bodies, NotTaken
from kvstrata.proxy.engines import AUTHORIZATION, CHECK_TIMEOUT_S, watch
from kvstrata.proxy.exchange import SILENT_S, Answer, EngineFailed, Exchange, within
from kvstrata.proxy.way import Way

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
IDLE_S = 75.0
"""How long a connection may stand without a request."""
MAX_FILES = 1 << 16
"""Descriptors, two for each request under way."""
KINDS = {400: "BadRequestError", 503: "ServiceUnavailableError"}
"""What vLLM calls its errors; others have the words of their status."""
FORWARDED = (AUTHORIZATION, "X-Request-Id", "X-Session-Id", "traceparent", "tracestate")
"""Headers of a client's that engines get."""


class Proxy:
    """Answers clients with the help of engines.

    Args:
        way: how engines come to answer a request.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self.outcomes: Counter[str] = Counter()
        self.bodies = Bodies()
        self._session: aiohttp.ClientSession

    def app(self) -> web.Application:
        """What an HTTP server runs."""
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.cleanup_ctx.append(self._life)
        return app

    async def _life(self, app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        # What an engine sets for one client is not for the next one.
        cookies = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=connector, cookie_jar=cookies) as self._session:
            watching = {
                asyncio.ensure_future(watch(self.way.engines, self._session)),
                asyncio.ensure_future(self.way.look(self._session)),
            }
            yield
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            answer, how = await self._begin(request)
        except NotTaken as error:
            return self._refuse(error.status, str(error))
        except EngineFailed as error:
            logger.error("a request fails: %s", error)
            return self._refuse(503, "no engine could answer; try again")
        except RecursionError:
            return self._refuse(400, "the body is nested too deeply")
        try:
            self.outcomes[how if answer.status < 400 else "refused"] += 1
            return await self._relay(request, answer)
        finally:
            answer.close()

    async def _begin(self, request: web.Request) -> tuple[Answer, str]:
        """The beginning of an answer: once it is there the request's body is needed no more."""
        headers = _forwarded(request)
        headers.setdefault("X-Request-Id", uuid.uuid4().hex)
        async with self.bodies.of(request) as body:
            return await self.way.answer(Exchange(self._session, request.path, body, headers))

    async def _relay(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """Pass an answer on as it comes; one that breaks off ends with an error of its own."""
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": answer.content_type}
        )
        await response.prepare(request)
        try:
            async for piece in answer.pieces():
                with _patience(request):
                    await response.write(piece)
        except EngineFailed as error:
            logger.error("an answer breaks off: %s", error)
            self.outcomes["broken off"] += 1
            event = {"error": _error(503, "the engine was lost in the middle; try again")}
            # The engine may have been lost within an event: that one ends here.
            with _patience(request):
                await response.write(f"\n\ndata: {json.dumps(event)}\n\n".encode())
        with _patience(request):
            await response.write_eof()
        return response

    async def _models(self, request: web.Request) -> web.StreamResponse:
        timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
        try:
            headers = _forwarded(request)
        except NotTaken as error:
            return self._refuse(error.status, str(error))
        for engine in sorted(self.way.engines, key=lambda engine: not engine.up):
            try:
                async with self._session.get(
                    engine.url / "v1" / "models",
                    timeout=timeout,
                    headers=engine.headers(headers),
                    allow_redirects=False,
                ) as response:
                    return web.Response(
                        body=await response.read(),
                        status=response.status,
                        content_type="application/json",
                    )
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                continue
        return self._refuse(503, "no engine is up; try again")

    async def _health(self, request: web.Request) -> web.Response:
        engines = {engine.name: engine.up for engine in self.way.engines}
        return web.json_response({"engines": engines}, status=200 if any(engines.values()) else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = ["# TYPE kvstrata_proxy_requests_total counter"]
        for outcome, count in sorted(self.outcomes.items()):
            lines.append(f'kvstrata_proxy_requests_total{{outcome="{outcome}"}} {count}')
        lines.append("# TYPE kvstrata_proxy_engine_up gauge")
        for engine in self.way.engines:
            lines.append(f'kvstrata_proxy_engine_up{{engine="{engine.name}"}} {int(engine.up)}')
        lines.append("# TYPE kvstrata_proxy_engine_failures_total counter")
        for engine in self.way.engines:
            labels = f'{{engine="{engine.name}"}}'
            lines.append(f"kvstrata_proxy_engine_failures_total{labels} {engine.num_failed}")
        return web.Response(text="\n".join([*lines, *self.way.metrics()]) + "\n")

    def _refuse(self, status: int, why: str) -> web.Response:
        self.outcomes["failed" if status >= 500 else "refused"] += 1
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return web.json_response({"error": _error(status, why)}, status=status, headers=headers)


def _forwarded(request: web.Request) -> dict[str, str]:
    """Headers of a client's for engines.

    Raises:
        NotTaken: one is nothing that can be passed on.
    """
    found = {name: request.headers[name] for name in FORWARDED if name in request.headers}
    if not all(value.isascii() and value.isprintable() for value in found.values()):
        raise NotTaken(400, "a header is no printable ASCII")
    return found


def _patience(request: web.Request) -> AbstractContextManager[None]:
    """Hang up on a client that takes nothing for long."""

    def hang_up() -> None:
        if request.transport is not None:
            request.transport.abort()

    return within(SILENT_S, hang_up)


def _error(status: int, why: str) -> dict[str, Any]:
    """As vLLM says it."""
    kind = KINDS.get(status) or HTTPStatus(status).phrase
    return {"message": why, "type": kind, "param": None, "code": status}


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is a mistake of ours: what is no HTTP comes as often as clients like."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


async def serve(proxy: Proxy, host: str, port: int) -> web.AppRunner:
    """Listen; `cleanup` on the runner ends it.

    Raises:
        OSError: one cannot listen there.
    """
    descriptors.allow(MAX_FILES)
    http_logger = logging.getLogger(f"{__name__}.http")
    http_logger.addFilter(_is_ours)
    runner = web.AppRunner(
        proxy.app(),
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=IDLE_S,
        logger=http_logger,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner
