"""What clients send: read within bounds of bytes and time, each body and all of them together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

MAX_BODY_BYTES = 64 << 20
MAX_BODIES_BYTES = 256 << 20
"""Of all that are being received, or whose answers have not begun."""
BODY_S = 60.0
"""For a whole body to come."""
UNREADABLE = (ValueError, LookupError, RecursionError, web.RequestPayloadError)
"""What comes of bodies that are no JSON: of its words, charset, nesting, compression."""


class NotTaken(Exception):
    """A request that goes no further, and the status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Bodies:
    """Reads bodies, and counts the bytes of all that it has read: ``held_bytes``."""

    def __init__(self) -> None:
        self.held_bytes = 0

    @asynccontextmanager
    async def of(self, request: web.Request) -> AsyncIterator[dict[str, Any]]:
        """A request's JSON object. It counts until the block ends.

        Raises:
            NotTaken: it is none, too long, too slow, or one too many.
        """
        too_long = NotTaken(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise too_long
        held = 0

        async def read() -> bytearray:
            nonlocal held
            data = bytearray()
            async for piece in request.content.iter_any():
                held += len(piece)
                self.held_bytes += len(piece)
                if held > MAX_BODY_BYTES:
                    raise too_long
                if self.held_bytes > MAX_BODIES_BYTES:
                    raise NotTaken(503, "too much is being received; try again")
                data += piece
            return data

        try:
            try:
                data = await asyncio.wait_for(read(), BODY_S)
                body = json.loads(data.decode(request.charset or "utf-8"))
                del data
            except asyncio.TimeoutError:
                raise NotTaken(408, f"the body has not come within {BODY_S:.0f} s") from None
            except UNREADABLE as error:
                raise NotTaken(400, f"the body is no JSON: {error}") from error
            if not isinstance(body, dict):
                raise NotTaken(400, "the body is no JSON object")
            yield body
        finally:
            self.held_bytes -= held
