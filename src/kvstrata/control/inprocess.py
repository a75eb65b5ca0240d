"""The API without a server: inside a command, straight to the node's socket.

So a command works the same whether an API runs or not.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import httpx
from starlette.types import Message

from kvstrata.config import Config
from kvstrata.config.api import ApiConfig
from kvstrata.control.app import build
from kvstrata.control.client import Client

URL = "http://localhost"


class InProcess(httpx.BaseTransport):
    """Runs the application on a loop of its own, until it is closed.

    Args:
        config: ``node`` says which node is asked.
    """

    def __init__(self, config: Config) -> None:
        self._guard, self._app = build(replace(config, api=ApiConfig()))
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        begun: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(begun,), name="kvstrata-api", daemon=True
        )
        self._thread.start()
        begun.result()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; waits for it."""
        body = request.read()
        answering = asyncio.run_coroutine_threadsafe(self._answer(request, body), self._loop)
        return answering.result()

    def close(self) -> None:
        """End the application. Repeatable."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join()

    def _run(self, begun: Future[None]) -> None:
        async def live() -> None:
            async with self._app.router.lifespan_context(self._app):
                begun.set_result(None)
                await self._ending.wait()

        try:
            self._loop.run_until_complete(live())
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)
        finally:
            self._loop.close()

    async def _answer(self, request: httpx.Request, body: bytes) -> httpx.Response:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.partition(b"?")[0],
            "query_string": request.url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": None,
            "server": ("localhost", 80),
            "state": {},
        }
        came: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            came.append(message)

        await self._guard(scope, receive, send)
        return httpx.Response(
            came[0]["status"],
            headers=came[0]["headers"],
            content=b"".join(message.get("body", b"") for message in came[1:]),
            request=request,
        )


def client(config: Config) -> Client:
    """A client whose API is in this process."""
    return Client(URL, transport=InProcess(config))
