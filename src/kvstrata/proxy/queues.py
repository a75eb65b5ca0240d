"""How many requests engines say that they have, from vLLM's own ``/metrics``."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence

import aiohttp

from kvstrata.proxy.engines import Engine
from kvstrata.routing import Loads

LOOK_EVERY_S = 2.0
LOOK_TIMEOUT_S = 2.0
MAX_METRICS_BYTES = 4 << 20
"""What is longer is not read: it is no engine's."""
MAX_REQUESTS = 1_000_000

_COUNT = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)", re.MULTILINE)


async def watch_queues(
    engines: Sequence[Engine], loads: Loads, session: aiohttp.ClientSession
) -> None:
    """Ask every engine that is up, again and again: others may send it requests, too."""
    while True:
        up = [engine for engine in engines if engine.up]
        counts = await asyncio.gather(*[_ask(engine, session) for engine in up])
        for engine, count in zip(up, counts, strict=True):
            loads.tell(engine.name, count)
        await asyncio.sleep(LOOK_EVERY_S)


async def _ask(engine: Engine, session: aiohttp.ClientSession) -> int | None:
    timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT_S)
    try:
        async with session.get(
            engine.url / "metrics", timeout=timeout, allow_redirects=False
        ) as response:
            if response.status != 200:
                return None
            text = bytearray()
            async for piece in response.content.iter_any():
                text += piece
                if len(text) > MAX_METRICS_BYTES:
                    return None
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
        return None
    return num_requests(bytes(text))


def num_requests(metrics: bytes) -> int | None:
    """Requests that run and wait, by all that the engine has of each; None if it does not say."""
    found = _COUNT.findall(metrics)
    try:
        total = math.fsum(map(float, found))
    except ValueError:
        return None
    return int(total) if found and 0 <= total <= MAX_REQUESTS else None
