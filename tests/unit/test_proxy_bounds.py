"""What the proxy holds and waits for is bounded: bodies, silent engines, clients that take none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from tests.support.proxies import BODY, Place, apart, behind_a_proxy, routed
from tests.support.stand_ins import until

from kvstrata.proxy import bodies, engines, exchange, server
from kvstrata.proxy.way import Way


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", 2 * BODY)

    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.open.clear()
        asking = [asyncio.ensure_future(place.ask()) for _ in range(2)]
        await until(lambda: place.asked() == 2)
        async with place.session.post("/v1/completions", data=b" ") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["code"] == 503
        for engine in place.engines:
            engine.open.set()
        assert [(await one)[0] for one in asking] == [200, 200]
        assert (await place.ask(2 * BODY))[0] == 200, "what was answered counts no more"
        assert (await place.ask(2 * BODY + 1))[0] == 503

    behind_a_proxy(test)


def test_a_body_counts_until_its_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", BODY)

    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "silent in the middle"
        async with place.session.post("/v1/completions", json={"stream": True}) as response:
            assert await response.content.readany() == b"data: 0\n\n"
            for engine in place.engines:
                engine.fails = ""
            assert (await place.ask(BODY))[0] == 200

    behind_a_proxy(test)


def test_a_body_that_is_being_received_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", BODY)

    async def test(place: Place) -> None:
        async with place.sending(BODY):
            await until(lambda: place.proxy.bodies.held_bytes == BODY)
            assert (await place.ask())[0] == 503
        await until(lambda: place.proxy.bodies.held_bytes == 0)
        assert (await place.ask())[0] == 200

    behind_a_proxy(test)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.1)

    async def test(place: Place) -> None:
        async with place.sending(BODY) as reader:
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            await until(lambda: place.proxy.bodies.held_bytes == 0)
        assert not place.asked()

    behind_a_proxy(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_one_body_is_bounded(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", BODY)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(BODY + 1):
            yield b" "

    async def test(place: Place) -> None:
        data = pieces() if chunked else b" " * (BODY + 1)
        async with place.session.post("/v1/completions", data=data) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == 413
        assert (await place.ask())[0] == 200

    behind_a_proxy(test)


@pytest.mark.parametrize("way", [routed, apart])
def test_an_engine_that_falls_silent_in_the_middle_has_failed(
    way: Callable[[list[str]], Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SILENT_S", 0.2)

    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "silent in the middle"
        status, text = await place.ask(stream=True)
        assert status == 200
        begun, _, event = text.partition("\n\n\n\ndata: ")
        assert begun == "data: 0"
        assert json.loads(event) == {
            "error": {
                "message": "the engine was lost in the middle; try again",
                "type": "ServiceUnavailableError",
                "param": None,
                "code": 503,
            }
        }
        assert place.proxy.outcomes["broken off"] == 1
        assert sum(engine.num_failed for engine in place.proxy.way.engines) == 1
        await until(lambda: sum(engine.gone for engine in place.engines) == 1)

    behind_a_proxy(test, way)


def test_an_engine_that_is_silent_from_the_start_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that computes prompts; before whole engines it is tested elsewhere."""
    monkeypatch.setattr(engines, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(engines, "CHECK_TIMEOUT_S", 2.0)

    async def test(place: Place) -> None:
        prefill, decode = place.engines
        prefill.open.clear()
        prefill.awake.clear()
        assert await place.ask() == (200, '{"text": "whole"}')
        assert prefill.gone == len(prefill.asked) == len(decode.asked) == 1
        prefill.awake.set()

    behind_a_proxy(test, apart)


def test_a_client_that_takes_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.2)

    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.fails = "never ends"
        async with place.session.post("/v1/completions", json={"stream": True}) as response:
            assert response.status == 200
            await until(lambda: sum(engine.gone for engine in place.engines) == 1)

    behind_a_proxy(test)


def test_what_is_no_http_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test(place: Place) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        writer.write(b"GET /\x00 HTTP/1.1\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()

    behind_a_proxy(test)
    assert not caplog.records


def test_a_mistake_of_ours_is_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(place: Place) -> None:
        monkeypatch.setattr(place.proxy.way, "answer", None)
        assert (await place.ask())[0] == 500

    behind_a_proxy(test)
    assert "TypeError" in caplog.text
