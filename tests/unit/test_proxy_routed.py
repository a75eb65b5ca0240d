"""The proxy before several whole engines that fail in every way; engine tests have real ones."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from tests.support.stand_ins import StandIn, until

from kvstrata.errors import ConfigError
from kvstrata.proxy import engines, queues
from kvstrata.proxy.queues import MAX_METRICS_BYTES, num_requests
from kvstrata.proxy.routed import Routed
from kvstrata.proxy.server import Proxy, serve
from kvstrata.routing import POLICIES

LONG = "Everybody knows this text. " * 400


class Place:
    """A proxy before three engines, and a client of it."""

    def __init__(self, ends: AsyncExitStack, route: str) -> None:
        self._ends = ends
        self._route = route
        self.engines = [StandIn() for _ in range(3)]

    async def start(self) -> None:
        for engine in self.engines:
            await self._ends.enter_async_context(engine.running())
        self.way = Routed([engine.url for engine in self.engines], POLICIES[self._route]())
        self.proxy = Proxy(self.way)
        runner = await serve(self.proxy, "127.0.0.1", 0)
        self._ends.push_async_callback(runner.cleanup)
        self.session = await self._ends.enter_async_context(
            aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}")
        )

    async def ask(self, prompt: object = LONG, **more: Any) -> tuple[int, str]:
        body = {"model": "m", "prompt": prompt, "max_tokens": 3, **more}
        async with self.session.post("/v1/completions", json=body) as response:
            return response.status, await response.text()

    def counts(self) -> list[int]:
        return [len(engine.asked) for engine in self.engines]

    async def asked(self) -> StandIn:
        """The one engine that has a request that it has not answered."""
        await until(lambda: sum(self.counts()) == 1)
        return next(engine for engine in self.engines if engine.asked)

    def idle(self) -> bool:
        return all(
            not self.way.loads.num_running(str(engine.url))
            and not self.way.loads.of(str(engine.url))
            for engine in self.way.engines
        )


def behind_a_proxy(
    test: Callable[[Place], Coroutine[Any, Any, None]], route: str = "cache-aware"
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as ends:
            place = Place(ends, route)
            await place.start()
            await asyncio.wait_for(test(place), 60)

    asyncio.run(main())


def test_what_begins_alike_goes_to_one_engine_and_the_rest_elsewhere() -> None:
    async def test(place: Place) -> None:
        for turn in range(6):
            assert await place.ask(LONG + f"turn {turn}") == (200, '{"text": "whole"}')
        assert sorted(place.counts()) == [0, 0, 6]
        for number in range(12):
            assert (await place.ask(f"another one, {number} " + LONG))[0] == 200
        assert min(place.counts()) >= 2
        assert place.idle()
        assert place.proxy.outcomes == {"routed": 18}

    behind_a_proxy(test)


def test_a_request_is_passed_on_as_it_is() -> None:
    async def test(place: Place) -> None:
        assert (await place.ask([1, 2, 3], kv_transfer_params={"kvstrata": {}}, n=1))[0] == 200
        (body,) = [body for engine in place.engines for body in engine.asked]
        assert body == {"model": "m", "prompt": [1, 2, 3], "max_tokens": 3, "n": 1,
                        "kv_transfer_params": {"kvstrata": {}}}  # fmt: skip

    behind_a_proxy(test)


def test_a_stream_comes_piece_by_piece_and_counts_until_its_end() -> None:
    async def test(place: Place) -> None:
        status, text = await place.ask(stream=True)
        assert (status, text) == (200, "data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
        await until(place.idle)

    behind_a_proxy(test)


def test_round_robin_takes_turns() -> None:
    async def test(place: Place) -> None:
        for _ in range(6):
            assert (await place.ask())[0] == 200
        assert place.counts() == [2, 2, 2]

    behind_a_proxy(test, "round-robin")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails", ["dies", "500"])
def test_before_the_first_byte_another_one_is_asked(fails: str, stream: bool) -> None:
    async def test(place: Place) -> None:
        for engine in place.engines[:2]:
            engine.fails = fails
        for number in range(4):
            status, text = await place.ask(f"{number} " + LONG, stream=stream)
            assert status == 200
            assert text.endswith("[DONE]\n\n") if stream else text == '{"text": "whole"}'
            assert not stream or text.count("data: 0") == 1
        assert len(place.engines[2].asked) == 4
        await until(place.idle)

    behind_a_proxy(test)


def test_each_is_asked_once_and_then_a_status_says_to_try_again() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "500"
        assert (await place.ask())[0] == 503
        assert place.counts() == [1, 1, 1]
        assert place.proxy.outcomes == {"failed": 1}
        assert place.idle()

    behind_a_proxy(test)


def test_a_faulty_request_is_not_tried_elsewhere() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "400"
        assert await place.ask() == (400, '{"error": "400"}')
        assert sum(place.counts()) == 1
        assert place.idle()

    behind_a_proxy(test)


def test_after_the_first_byte_nobody_else_is_asked() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "dies in the middle"
        status, text = await place.ask(stream=True)
        assert status == 200
        assert text.startswith("data: 0\n\n")
        assert '"code": 503' in text
        assert "[DONE]" not in text
        assert sum(place.counts()) == 1
        await until(place.idle)

    behind_a_proxy(test)


def test_one_that_hangs_loses_what_it_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel lets one connect and its process does nothing, as if stopped."""
    monkeypatch.setattr(engines, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(engines, "CHECK_TIMEOUT_S", 2.0)

    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.open.clear()
        asking = asyncio.ensure_future(place.ask())
        stuck = await place.asked()
        for engine in place.engines:
            if engine is not stuck:
                engine.open.set()
        stuck.awake.clear()
        assert await asking == (200, '{"text": "whole"}')
        assert stuck.gone == 1
        await until(place.idle)
        # It is left alone until it answers again.
        for number in range(6):
            assert (await place.ask(f"{number} " + LONG))[0] == 200
        assert len(stuck.asked) == 1
        stuck.awake.set()
        stuck.open.set()
        await until(lambda: all(engine.up for engine in place.way.engines))
        for number in range(9):
            assert (await place.ask(f"again {number} " + LONG))[0] == 200
        assert len(stuck.asked) > 1

    behind_a_proxy(test)


def test_one_that_is_slow_is_not_asked_while_others_are_idle() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.open.clear()
        asking = [asyncio.ensure_future(place.ask())]
        slow = await place.asked()
        for engine in place.engines:
            if engine is not slow:
                engine.open.set()
        for number in range(8):
            assert (await place.ask(f"{number} " + LONG))[0] == 200
        assert len(slow.asked) == 1
        assert not asking[0].done()
        slow.open.set()
        assert (await asking[0])[0] == 200
        await until(place.idle)

    behind_a_proxy(test, "least-load")


def test_a_client_that_leaves_ends_its_request() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.open.clear()
        asking = asyncio.ensure_future(place.ask())
        slow = await place.asked()
        assert not place.idle()
        asking.cancel()
        await until(lambda: slow.gone == 1 and place.idle())

    behind_a_proxy(test)


def test_nothing_is_left_of_many_requests_that_end_in_every_way() -> None:
    async def test(place: Place) -> None:
        draw = random.Random(7)

        async def one(number: int) -> None:
            asking = asyncio.ensure_future(
                place.ask(f"{draw.randrange(9)} " + LONG, stream=draw.random() < 0.5)
            )
            if draw.random() < 0.2:
                await asyncio.sleep(draw.uniform(0, 0.02))
                asking.cancel()
            await asyncio.wait({asking})
            if not asking.cancelled():
                assert asking.result()[0] in (200, 400, 503)

        for number in range(15):
            for engine in place.engines:
                engine.fails = draw.choice(["", "", "dies", "500", "400", "dies in the middle"])
            await asyncio.gather(*[one(10 * number + i) for i in range(10)])
            for known in place.way.engines:
                known.answered()
        await until(place.idle)

    behind_a_proxy(test)


METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b"} 3.0
vllm:num_requests_running{engine="1",model_name="a}b"} 1.0
vllm:num_requests_waiting{engine="0",model_name="a}b"} 40.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (METRICS, 44),
        (b"vllm:num_requests_running 2", 2),
        (b"", None),
        (b"\xff\xfe\n" * 9, None),
        (b"vllm:num_requests_running x", None),
        (b"vllm:num_requests_running NaN", None),
        (b"vllm:num_requests_running 1e400", None),
        (b"vllm:num_requests_running -5", None),
        (b"vllm:num_requests_running 1e30", None),
    ],
)
def test_what_an_engine_says_of_its_queue(text: bytes, expected: int | None) -> None:
    assert num_requests(text) == expected


def test_others_requests_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "LOOK_EVERY_S", 0.02)

    async def test(place: Place) -> None:
        first, second, third = place.engines
        first.metrics = METRICS
        second.metrics = b"vllm:num_requests_waiting 7\n"
        third.metrics = METRICS + b"#" * MAX_METRICS_BYTES  # too long to be read

        def loads() -> list[float]:
            return [place.way.loads.of(str(engine.url)) for engine in place.way.engines]

        await until(lambda: loads()[0] > loads()[1] > 0)
        assert loads()[2] == 0
        for number in range(4):
            assert (await place.ask(f"{number} " + LONG))[0] == 200
        assert place.counts() == [0, 0, 4]
        first.metrics = second.metrics = b""
        await until(lambda: loads() == [0, 0, 0])

    behind_a_proxy(test, "least-load")


def test_metrics_say_where_requests_go() -> None:
    async def test(place: Place) -> None:
        place.engines[0].open.clear()
        asking = asyncio.ensure_future(place.ask())
        await until(lambda: len(place.engines[0].asked) == 1)
        async with place.session.get("/metrics") as response:
            text = await response.text()
        url = place.engines[0].url
        assert 'kvstrata_proxy_routed_total{reason="load"} 1\n' in text
        assert f'kvstrata_proxy_engine_running{{engine="{url}"}} 1\n' in text
        load = float(text.partition(f'engine_load_tokens{{engine="{url}"}} ')[2].split()[0])
        assert load > len(LONG) / 4
        place.engines[0].open.set()
        assert (await asking)[0] == 200

    behind_a_proxy(test, "least-load")


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1/"]])
def test_no_engine_or_one_twice_is_an_error(urls: list[str]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        Routed(urls, POLICIES["round-robin"]())


def proxy_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvstrata.cli", "proxy", "--port=0", *arguments]


def test_the_command() -> None:
    command = proxy_command(
        "--engine=http://127.0.0.1:1", "--engine=http://127.0.0.1:2", "--route=least-load"
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("proxy on http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --engine, or"),
        (["--prefill=http://a:1"], "expected --engine, or"),
        (["--engine=http://a:1", "--decode=http://a:1"], "expected --engine, or"),
        (["--engine=http://a:1", "--route=best"], "'best' is none of cache-aware, least-load"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], words: str) -> None:
    found = subprocess.run(proxy_command(*arguments), capture_output=True, text=True, timeout=60)
    assert found.returncode != 0
    assert words in " ".join(found.stderr.split())
