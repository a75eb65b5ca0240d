"""How engines come to answer a request: what a proxy asks of either way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import aiohttp

from kvstrata.proxy.engines import Engine
from kvstrata.proxy.exchange import Answer, Exchange


class Way(ABC):
    """Chooses engines for requests. ``engines``: all of them."""

    engines: Sequence[Engine]

    @abstractmethod
    async def answer(self, exchange: Exchange) -> tuple[Answer, str]:
        """The beginning of an answer, and how it came about.

        Raises:
            EngineFailed: nobody could.
        """

    async def look(self, session: aiohttp.ClientSession) -> None:
        """Look at the engines beside their health, until cancelled."""
        return

    def metrics(self) -> list[str]:
        """Lines of its own for ``/metrics``."""
        return []
