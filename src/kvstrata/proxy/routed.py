"""Several whole engines: each request goes to one, by what it has and how busy it is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial

import aiohttp

from kvstrata.errors import ConfigError
from kvstrata.proxy.engines import Engine
from kvstrata.proxy.exchange import Answer, EngineFailed, Exchange
from kvstrata.proxy.queues import watch_queues
from kvstrata.proxy.way import Way
from kvstrata.routing import Loads, Policy, prompt_of_request

logger = logging.getLogger(__name__)


class Routed(Way):
    """Asks one engine after the other until an answer begins, each at most once.

    Args:
        urls: of the engines.
        policy: which of them to ask.

    Raises:
        ConfigError: there is none, one is no URL of an engine, or stands there twice.
    """

    def __init__(self, urls: Sequence[str], policy: Policy) -> None:
        self.engines = [Engine(url) for url in urls]
        self._by_name = {engine.name: engine for engine in self.engines}
        if not urls or len(self._by_name) != len(urls):
            raise ConfigError("proxy", "expected the URLs of one or more engines, each once")
        self._policy = policy
        self.loads = Loads()
        self.reasons: Counter[str] = Counter()

    async def answer(self, exchange: Exchange) -> tuple[Answer, str]:
        prompt = prompt_of_request(exchange.body)
        failed: set[Engine] = set()
        last = EngineFailed(self.engines[0], "no engine is up")
        while names := [
            name for name, engine in self._by_name.items() if engine.up and engine not in failed
        ]:
            choice = self._policy.route(prompt, names, self.loads.all())
            self._policy.sent(prompt, choice)
            self.reasons[choice.reason.value] += 1
            logger.debug("a request goes to %s", choice)
            engine = self._by_name[choice.node]
            running = self.loads.begin(choice.node, prompt.num_tokens - choice.hit_tokens)
            try:
                answer = await exchange.whole(engine)
            except EngineFailed as error:
                self.loads.end(running)
                logger.warning("a request goes on elsewhere: %s", error)
                failed.add(engine)
                last = error
                continue
            except BaseException:
                self.loads.end(running)
                raise
            self.loads.answers(running)
            answer.at_close(partial(self.loads.end, running))
            return answer, "routed"
        raise last

    async def look(self, session: aiohttp.ClientSession) -> None:
        await watch_queues(self.engines, self.loads, session)

    def metrics(self) -> list[str]:
        lines = ["# TYPE kvstrata_proxy_routed_total counter"]
        for reason, count in sorted(self.reasons.items()):
            lines.append(f'kvstrata_proxy_routed_total{{reason="{reason}"}} {count}')
        lines.append("# TYPE kvstrata_proxy_engine_running gauge")
        for name in self._by_name:
            running = self.loads.num_running(name)
            lines.append(f'kvstrata_proxy_engine_running{{engine="{name}"}} {running}')
        lines.append("# TYPE kvstrata_proxy_engine_load_tokens gauge")
        for name in self._by_name:
            load = self.loads.of(name)
            lines.append(f'kvstrata_proxy_engine_load_tokens{{engine="{name}"}} {load:.0f}')
        return lines
