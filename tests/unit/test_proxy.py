"""The proxy before engines that fail in every way; the engine tests have real ones."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from tests.support.stand_ins import CHECK, PEER, StandIn, until

from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER, decode_elsewhere, prefill_elsewhere
from kvstrata.errors import ConfigError
from kvstrata.proxy import engines
from kvstrata.proxy.apart import Apart
from kvstrata.proxy.engines import Engine, Engines
from kvstrata.proxy.exchange import EngineFailed
from kvstrata.proxy.server import Proxy, serve

PROMPT = {"model": "m", "prompt": "hello", "max_tokens": 3, "min_tokens": 2, "n": 1}


class Place:
    """A proxy before two engines that compute and two that decode, and a client of it."""

    def __init__(self, ends: AsyncExitStack) -> None:
        self._ends = ends
        self.prefill = [StandIn(), StandIn()]
        self.decode = [StandIn(), StandIn()]

    async def start(self, num_prefill: int = 1, num_decode: int = 1) -> None:
        self.prefill, self.decode = self.prefill[:num_prefill], self.decode[:num_decode]
        for engine in (*self.prefill, *self.decode):
            await self._ends.enter_async_context(engine.running())
        self.proxy = Proxy(
            Apart([one.url for one in self.prefill], [one.url for one in self.decode])
        )
        runner = await serve(self.proxy, "127.0.0.1", 0)
        self._ends.push_async_callback(runner.cleanup)
        self.session = await self._ends.enter_async_context(
            aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}")
        )

    async def ask(self, **more: Any) -> tuple[int, str]:
        async with self.session.post("/v1/completions", json={**PROMPT, **more}) as response:
            return response.status, await response.text()

    async def know_the_peer(self) -> None:
        """By a request whose prompt was computed first."""
        assert (await self.ask())[0] == 200
        for engine in (*self.prefill, *self.decode):
            engine.asked.clear()


def behind_a_proxy(test: Callable[[Place], Coroutine[Any, Any, None]], **counts: int) -> None:
    async def main() -> None:
        async with AsyncExitStack() as ends:
            place = Place(ends)
            await place.start(**counts)
            await asyncio.wait_for(test(place), 30)

    asyncio.run(main())


def test_the_first_request_tells_where_the_node_is() -> None:
    async def test(place: Place) -> None:
        assert await place.ask() == (200, '{"text": "whole"}')
        (computed,), (decoded,) = place.prefill[0].asked, place.decode[0].asked
        assert computed == {
            "model": "m", "prompt": "hello", "max_tokens": 1, "stream": False,
            "kv_transfer_params": COMPUTE_FOR_ANOTHER,
        }  # fmt: skip
        assert decoded["kv_transfer_params"] == decode_elsewhere(PEER, b"n", "r", 5, 1, CHECK)
        assert {name: decoded[name] for name in PROMPT} == PROMPT

    behind_a_proxy(test)


def test_hints_of_the_client_reach_both_engines_and_name_no_peer() -> None:
    async def test(place: Place) -> None:
        hints = {"store": False, "session": "s"}
        sent = {"kvstrata": {**hints, "peer": "10.0.0.9:1", "running": True}, "other": 1}
        assert (await place.ask(kv_transfer_params=sent))[0] == 200
        (computed,), (decoded,) = place.prefill[0].asked, place.decode[0].asked
        assert computed["kv_transfer_params"] == {**COMPUTE_FOR_ANOTHER, "kvstrata": hints}
        told = decode_elsewhere(PEER, b"n", "r", 5, 1, CHECK)
        assert decoded["kv_transfer_params"] == {**told, "kvstrata": {**hints, **told["kvstrata"]}}
        assert (await place.ask(kv_transfer_params={"kvstrata": 3}))[0] == 200
        assert place.prefill[0].asked[-1]["kv_transfer_params"] == COMPUTE_FOR_ANOTHER

    behind_a_proxy(test)


def test_then_both_begin_at_once() -> None:
    async def test(place: Place) -> None:
        await place.know_the_peer()
        place.prefill[0].open.clear()
        place.decode[0].open.clear()
        asking = asyncio.ensure_future(place.ask(max_completion_tokens=9))
        await until(lambda: len(place.prefill[0].asked) == len(place.decode[0].asked) == 1)
        assert place.decode[0].asked[0]["kv_transfer_params"] == prefill_elsewhere(PEER, CHECK)
        assert place.prefill[0].asked[0]["max_completion_tokens"] == 1
        place.prefill[0].open.set()
        place.decode[0].open.set()
        assert (await asking)[0] == 200
        assert place.proxy.outcomes == {"split": 2}

    behind_a_proxy(test)


def test_a_stream_comes_piece_by_piece() -> None:
    async def test(place: Place) -> None:
        status, text = await place.ask(stream=True, stream_options={"include_usage": True})
        assert (status, text) == (200, "data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
        assert "stream_options" not in place.prefill[0].asked[0]
        assert "stream_options" in place.decode[0].asked[0]

    behind_a_proxy(test)


@pytest.mark.parametrize("fails", ["dies", "500", "nonsense"])
@pytest.mark.parametrize("known", [False, True])
def test_without_prefill_the_other_side_does_all_of_it(fails: str, known: bool) -> None:
    async def test(place: Place) -> None:
        if known:
            await place.know_the_peer()
            place.decode[0].open.clear()
        place.prefill[0].fails = fails
        asking = asyncio.ensure_future(place.ask())
        if known:
            await until(lambda: place.decode[0].gone == 1)
            place.decode[0].open.set()
        assert await asking == (200, '{"text": "whole"}')
        assert "kv_transfer_params" not in place.decode[0].asked[-1]
        assert place.proxy.outcomes["whole"] == 1

    behind_a_proxy(test)


@pytest.mark.parametrize("stream", [False, True])
def test_without_decode_the_one_that_computes_does_all_of_it(stream: bool) -> None:
    async def test(place: Place) -> None:
        place.decode[0].fails = "dies"
        status, text = await place.ask(stream=stream)
        assert status == 200
        assert text.endswith("[DONE]\n\n") if stream else text == '{"text": "whole"}'
        assert "kv_transfer_params" not in place.prefill[0].asked[-1]
        assert place.prefill[0].asked[-1]["max_tokens"] == 3

    behind_a_proxy(test)


def test_another_one_that_decodes_comes_first() -> None:
    async def test(place: Place) -> None:
        place.decode[0].fails = place.decode[1].fails = "dies"
        place.decode[0].fails = ""
        for _ in range(2):
            assert (await place.ask())[0] == 200
        assert all(body["max_tokens"] == 1 for body in place.prefill[0].asked)

    behind_a_proxy(test, num_decode=2)


def test_without_any_that_compute_the_others_take_turns() -> None:
    async def test(place: Place) -> None:
        for _ in range(4):
            assert (await place.ask())[0] == 200
        for engine in place.decode:
            assert [body["max_tokens"] for body in engine.asked] == [3, 3]
        assert place.proxy.outcomes == {"whole": 4}

    behind_a_proxy(test, num_prefill=0, num_decode=2)


def test_when_nobody_can_a_status_says_to_try_again() -> None:
    async def test(place: Place) -> None:
        place.decode[0].fails = place.prefill[0].fails = "dies"
        async with place.session.post("/v1/completions", json=PROMPT) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["code"] == 503
        assert place.proxy.outcomes == {"failed": 1}

    behind_a_proxy(test)


def test_an_answer_that_breaks_off_says_so() -> None:
    async def test(place: Place) -> None:
        place.decode[0].fails = "dies in the middle"
        status, text = await place.ask(stream=True)
        assert status == 200
        assert text.startswith("data: 0\n\n")
        assert "[DONE]" not in text
        assert "\n\n\n\ndata: {" in text, "an event that was cut ends before the error begins"
        event = json.loads(text.rstrip().rpartition("data: ")[2])
        assert event["error"]["code"] == 503
        assert place.proxy.outcomes["broken off"] == 1

    behind_a_proxy(test)


@pytest.mark.parametrize("known", [False, True])
def test_a_faulty_request_is_not_tried_elsewhere(known: bool) -> None:
    async def test(place: Place) -> None:
        if known:
            await place.know_the_peer()
            place.decode[0].open.clear()
        place.prefill[0].fails = "400"
        assert await place.ask() == (400, '{"error": "400"}')
        assert len(place.decode[0].asked) == known
        assert place.proxy.outcomes["refused"] == 1

    behind_a_proxy(test)


@pytest.mark.parametrize("body", ["", "[1]", "{", "\udcff"])
def test_what_is_no_request_is_refused(body: str) -> None:
    async def test(place: Place) -> None:
        data = body.encode(errors="surrogateescape")
        async with place.session.post("/v1/completions", data=data) as response:
            assert response.status == 400
            assert "no JSON" in await response.text()
        assert not place.prefill[0].asked

    behind_a_proxy(test)


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", {}),
        (b"{}", {"Content-Type": "application/json; charset=nosuch"}),
        (b"xx", {"Content-Encoding": "gzip"}),
        (b"{}", {"X-Request-Id": "\xe9"}),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, headers: dict[str, str]) -> None:
    async def test(place: Place) -> None:
        async with place.session.post("/v1/completions", data=data, headers=headers) as response:
            assert response.status == 400
        assert not place.prefill[0].asked

    behind_a_proxy(test)


def test_a_password_of_an_engine_is_shown_to_nobody() -> None:
    engine = Engine("http://anna:hidden@127.0.0.1:8100")
    assert engine.name == str(Engine("http://127.0.0.1:8100").url)
    assert engine.url.password == "hidden", "it is used all the same"
    assert "hidden" not in str(EngineFailed(engine, "silent"))

    async def test(place: Place) -> None:
        place.proxy.way.engines = [engine]
        for path in ("/health", "/metrics"):
            async with place.session.get(path) as response:
                text = await response.text()
            assert engine.name in text
            assert "hidden" not in text

    behind_a_proxy(test)


def test_a_client_that_leaves_ends_both() -> None:
    async def test(place: Place) -> None:
        await place.know_the_peer()
        place.prefill[0].open.clear()
        place.decode[0].open.clear()
        asking = asyncio.ensure_future(place.ask())
        await until(lambda: len(place.prefill[0].asked) == len(place.decode[0].asked) == 1)
        asking.cancel()
        await until(lambda: place.prefill[0].gone == place.decode[0].gone == 1)

    behind_a_proxy(test)


def test_engines_take_turns_and_headers_are_passed_on() -> None:
    async def test(place: Place) -> None:
        headers = {"Authorization": "Bearer k", "Cookie": "secret", "X-Request-Id": "7"}
        for _ in range(4):
            async with place.session.post(
                "/v1/chat/completions", json={"messages": []}, headers=headers
            ) as response:
                assert response.status == 200
        for engine in (*place.prefill, *place.decode):
            assert len(engine.asked) == 2
            for got in engine.headers:
                assert (got["Authorization"], got["X-Request-Id"]) == ("Bearer k", "7")
                assert "Cookie" not in got

    behind_a_proxy(test, num_prefill=2, num_decode=2)


def test_health_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CHECK_EVERY_S", 0.02)

    async def test(place: Place) -> None:
        async def health() -> tuple[int, list[bool]]:
            async with place.session.get("/health") as response:
                return response.status, list((await response.json())["engines"].values())

        assert await health() == (200, [True, True])
        place.decode[0].health = 503
        await until(lambda: not place.proxy.way.engines[1].up)
        assert await health() == (200, [True, False])
        assert (await place.ask())[0] == 200
        assert not place.decode[0].asked
        place.prefill[0].health = 500
        await until(lambda: not place.proxy.way.engines[0].up)
        assert (await health())[0] == 503
        assert (await place.ask())[0] == 503
        place.prefill[0].health = place.decode[0].health = 200
        await until(lambda: all(engine.up for engine in place.proxy.way.engines))
        async with place.session.get("/metrics") as response:
            text = await response.text()
        assert 'kvstrata_proxy_requests_total{outcome="whole"} 1\n' in text
        assert f'kvstrata_proxy_engine_up{{engine="{place.decode[0].url}"}} 1\n' in text
        async with place.session.get("/v1/models") as response:
            assert response.status == 200

    behind_a_proxy(test)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8100", "http://", "ftp://a", "http://a/v1"])
def test_what_is_no_url_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="no engine's URL"):
        Engine(url)


def test_turns() -> None:
    one, two = Engine("http://a:1"), Engine("http://b:1")
    group = Engines([one, two])
    assert {group.next(), group.next()} == {one, two}
    one.failed("no")
    assert [group.next(), group.next()] == [two, two]
    assert group.next({two}) is None


def test_the_command() -> None:
    command = [sys.executable, "-m", "kvstrata.cli", "proxy", "--prefill=http://127.0.0.1:1",
               "--decode=http://127.0.0.1:2", "--port=0"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("proxy on http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
