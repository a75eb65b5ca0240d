"""Prefill and decode apart: one engine computes, another one goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.proxy.engines import Engine, Engines
from kvstrata.proxy.exchange import Answer, EngineFailed, Exchange, Refused
from kvstrata.proxy.way import Way

logger = logging.getLogger(__name__)


class Apart(Way):
    """Hands each request to two engines; whoever is left does all of it.

    Args:
        prefill: URLs of the engines that compute prompts.
        decode: URLs of those that go on with them.

    Raises:
        ConfigError: one of them is no URL of an engine.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        self.prefill = Engines([Engine(url) for url in prefill])
        self.decode = Engines([Engine(url) for url in decode])
        self.engines = [*self.prefill, *self.decode]

    async def answer(self, exchange: Exchange) -> tuple[Answer, str]:
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
