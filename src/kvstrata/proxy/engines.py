"""The engines behind the proxy: which of them answer, and whose turn it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import aiohttp
from yarl import URL

from kvstrata.errors import ConfigError

logger = logging.getLogger(__name__)

AUTHORIZATION = "Authorization"
CHECK_EVERY_S = 1.0
CHECK_TIMEOUT_S = 10.0
"""A busy engine may answer late; one that is dead refuses at once."""


class Engine:
    """One OpenAI-compatible server.

    Args:
        url: of it, without ``/v1``.

    Raises:
        ConfigError: it is no such URL.
    """

    def __init__(self, url: str) -> None:
        self.url = URL(url.rstrip("/"))
        if self.url.scheme not in ("http", "https") or not self.url.host or self.url.path != "/":
            raise ConfigError(
                "proxy", f"{url!r} is no engine's URL; expected one such as http://127.0.0.1:8100"
            )
        self.name = str(self.url.with_user(None))
        """Without a password, for people and programs that look."""
        self.up = True
        self.address = ""
        """Where its node answers others, once it has said so."""
        self.secret = ""
        """Which secret it stores by, likewise."""
        self.num_failed = 0
        self.silent = asyncio.Event()
        """Set while it does not answer in time, though it lets one connect: what it was asked is
        not answered either."""

    def headers(self, given: Mapping[str, str]) -> dict[str, str]:
        """A client's, for it: where its URL has a password, that is who asks."""
        known = self.url.user is not None or self.url.password is not None
        return {name: given[name] for name in given if not (known and name == AUTHORIZATION)}

    def failed(self, why: str) -> None:
        """It cannot be used for now; its restarted self may have another node."""
        self.num_failed += 1
        if self.up:
            logger.warning("%s is down: %s", self.name, why)
        self.up, self.address = False, ""

    def answered(self) -> None:
        """It can be used."""
        if not self.up:
            logger.info("%s is up", self.name)
        self.up = True
        self.silent.clear()


class Engines:
    """Engines of one role, in turn.

    Args:
        engines: all of them.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        self._turn = 0

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    def next(self, but: Collection[Engine] = ()) -> Engine | None:
        """The one whose turn it is, of those that are up; None if there is none."""
        self._turn += 1
        count = len(self._engines)
        for i in range(count):
            engine = self._engines[(self._turn + i) % count]
            if engine.up and engine not in but:
                return engine
        return None


async def watch(engines: Sequence[Engine], session: aiohttp.ClientSession) -> None:
    """Ask every engine for its health, again and again; one that hangs holds up no other."""
    await asyncio.gather(*[_watch(engine, session) for engine in engines])


async def _watch(engine: Engine, session: aiohttp.ClientSession) -> None:
    while True:
        await _check(engine, session)
        await asyncio.sleep(CHECK_EVERY_S)


async def _check(engine: Engine, session: aiohttp.ClientSession) -> None:
    timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
    try:
        async with session.get(
            engine.url / "health", timeout=timeout, allow_redirects=False
        ) as response:
            status = response.status
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        if isinstance(error, asyncio.TimeoutError):
            engine.silent.set()
        if engine.up:
            engine.failed(str(error) or type(error).__name__)
        return
    if status == 200:
        engine.answered()
    elif engine.up:
        engine.failed(f"its health is {status}")
