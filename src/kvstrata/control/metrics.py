"""``/metrics`` of a node: an ASGI application that asks it, and makes text in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kvstrata.errors import DeadlineExceeded, KVStrataError
from kvstrata.observe.rendering import CONTENT_TYPE, render
from kvstrata.wire import protocol as p

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class MetricsApp:
    """Answers ``GET`` with the metrics, and 503 while no node does.

    Args:
        ask: `kvstrata.wire.client.NodeClient.metrics` of a client that stands; may block, for as
            long as the client's deadline.
    """

    def __init__(self, ask: Callable[[], p.Measured]) -> None:
        self._ask = ask

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        if scope["method"] not in ("GET", "HEAD"):
            return await _answer(send, 405, b"only GET", "text/plain")
        try:
            body = await asyncio.to_thread(lambda: render(self._ask()))
        except (KVStrataError, DeadlineExceeded) as error:
            return await _answer(send, 503, str(error).encode(), "text/plain; charset=utf-8")
        await _answer(send, 200, body, CONTENT_TYPE)


async def _answer(send: Send, status: int, body: bytes, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
