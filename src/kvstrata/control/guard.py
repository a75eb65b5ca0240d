"""What stands before every endpoint: who may ask, how much, and for how long.

Pure ASGI, outside the application: nothing of a request is looked at before its name, its origin
and its token are, and nothing is read of a body beyond what is accepted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstrata.control import problems
from kvstrata.control.access import (
    MAY_WRITE,
    SAFE_METHODS,
    WRITE,
    Tokens,
    cross_site,
    misdirected,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
"""A prompt of a million tokens as numbers, or several times that as text."""
MAX_BODIES_BYTES = 64 << 20
"""Of all bodies that are being received or worked at."""
BODY_S = 20.0
"""For a whole body to come."""
MAX_REQUESTS = 512
"""Under way at a time; more are told to come back."""
REQUEST_S = 120.0
"""For an answer to be made and taken; each verb has a shorter deadline of its own."""

PROBES = frozenset({"/v1/health", "/v1/ready"})
"""What is asked without a token; it says nothing of what is held."""
JSON = "application/json"


class Refused(Exception):
    """A request that goes no further, and how it is answered."""

    def __init__(self, response: Response) -> None:
        self.response = response


def refuse(status: int, detail: str, **headers: str) -> Refused:
    return Refused(problems.answer(status, detail, headers=headers))


class Guard:
    """The application behind its limits.

    Args:
        app: what answers those that may ask.
        tokens: which are demanded; None: none are.
        local: whether the API listens where only this machine reaches it.
        reads: paths that a token for reading may post to.
        pages: paths that need no token, since they tell nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens | None,
        local: bool,
        reads: Collection[str],
        pages: Collection[str] = (),
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._local = local
        self._reads = frozenset(reads)
        self._open = PROBES | frozenset(pages)
        self._under_way = 0
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await asyncio.wait_for(self._answer(scope, receive, tell), REQUEST_S)
        except Refused as refused:
            await refused.response(scope, receive, send)
        except asyncio.TimeoutError:
            if not begun:
                await problems.answer(504, f"no answer within {REQUEST_S:.0f} s")(
                    scope, receive, send
                )
        except Exception as error:
            logger.error("a request failed", exc_info=error)
            if not begun:
                await problems.crashed(error)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        scope[MAY_WRITE] = self._check(scope["method"], scope["path"], headers)
        held = 0

        def hold(nbytes: int) -> None:
            nonlocal held
            held += nbytes
            self._bodies_bytes += nbytes
            if self._bodies_bytes > MAX_BODIES_BYTES:
                raise refuse(503, "too much is being received; try again", Connection="close")

        try:
            body = await _body(scope["method"], headers, receive, hold)
            if self._under_way >= MAX_REQUESTS:
                raise refuse(503, f"{MAX_REQUESTS} requests are under way; try again")
            self._under_way += 1
            try:
                await self._app(scope, _given(body, receive), send)
            finally:
                self._under_way -= 1
        finally:
            self._bodies_bytes -= held

    def _check(self, method: str, path: str, headers: Headers) -> bool:
        """Whether who asks may write; raises `Refused` for who may not ask this."""
        if "transfer-encoding" in headers and "content-length" in headers:
            raise refuse(
                400,
                "Content-Length and Transfer-Encoding say two things of one body",
                Connection="close",
            )
        if len(headers.getlist("host")) != 1 or misdirected(headers["host"], self._local):
            raise refuse(
                421, "this API is asked by an address of loopback or as localhost, not by the name "
                "that the Host header gives",
            )  # fmt: skip
        if cross_site(method, headers):
            raise refuse(403, "a page of another site may not ask this API")
        if self._tokens is None:
            return True
        if path in self._open:
            return False
        scheme, _, token = headers.get("authorization", "").partition(" ")
        right = self._tokens.right(token.strip()) if scheme.lower() == "bearer" else ""
        if not right:
            raise refuse(
                401, "a token is needed: Authorization: Bearer TOKEN", **{
                    "WWW-Authenticate": 'Bearer realm="kvstrata"'
                },
            )  # fmt: skip
        if right != WRITE and method not in SAFE_METHODS and path not in self._reads:
            raise refuse(403, "this token may read only")
        return right == WRITE


async def _body(
    method: str, headers: Headers, receive: Receive, hold: Callable[[int], None]
) -> bytes:
    """The whole body, of which so much may come in so much time. Raises `Refused`."""
    length = headers.get("content-length", "0")
    if "transfer-encoding" not in headers and length == "0":
        return b""
    if method in SAFE_METHODS:
        raise refuse(400, f"a {method} has no body", Connection="close")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise refuse(415, f"the body's Content-Type has to be {JSON}", Connection="close")
    too_long = refuse(413, f"the body is longer than {MAX_BODY_BYTES} bytes", Connection="close")
    if len(length) > 20 or int(length) > MAX_BODY_BYTES:
        raise too_long

    async def read() -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise refuse(400, "the body broke off")
            piece, more = message.get("body", b""), message.get("more_body", False)
            hold(len(piece))
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise refuse(
            408, f"the body has not come within {BODY_S:.0f} s", Connection="close"
        ) from None


def _given(body: bytes, receive: Receive) -> Receive:
    """A body that is here already, then whatever comes."""
    told = False

    async def give() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give
