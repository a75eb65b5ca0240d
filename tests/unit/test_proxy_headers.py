"""Whose word the proxy passes on: not one client's to another, nor to whom an engine points."""

from __future__ import annotations

import pytest
from tests.support.proxies import Place, behind_a_proxy, routed
from tests.support.stand_ins import StandIn

from kvstrata.proxy.way import Way


def by_name(urls: list[str]) -> Way:
    return routed([url.replace("127.0.0.1", "localhost") for url in urls])


def with_password(urls: list[str]) -> Way:
    return routed([url.replace("http://", "http://anna:hidden@") for url in urls])


def test_a_cookie_of_one_client_is_not_sent_for_the_next() -> None:
    async def test(place: Place) -> None:
        for engine in place.engines:
            engine.says = {"Set-Cookie": "session=anna"}
        for _ in range(4):
            async with place.session.post("/v1/completions", json={}) as response:
                assert response.status == 200
                assert "Set-Cookie" not in response.headers
        for engine in place.engines:
            assert len(engine.asked) == 2
            assert all("Cookie" not in headers for headers in engine.headers)

    behind_a_proxy(test, by_name)


def test_an_engine_sends_the_proxy_nowhere() -> None:
    async def test(place: Place) -> None:
        elsewhere = StandIn()
        async with elsewhere.running():
            for engine in place.engines:
                engine.fails = "307"
                engine.says = {"Location": f"{elsewhere.url}/v1/completions"}
            assert (await place.ask())[0] == 503
        assert place.asked() == 2
        assert not elsewhere.asked

    behind_a_proxy(test)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
def test_a_password_of_an_engines_url_goes_before_a_clients(path: str) -> None:
    async def test(place: Place) -> None:
        method = "GET" if path == "/v1/models" else "POST"
        headers = {"Authorization": "Bearer mine"}
        async with place.session.request(method, path, data=b"{}", headers=headers) as response:
            assert response.status == 200
        (got,) = [headers for engine in place.engines for headers in engine.headers]
        assert got.getall("Authorization") == ["Basic YW5uYTpoaWRkZW4="]

    behind_a_proxy(test, with_password)


def test_models_are_asked_in_the_clients_name() -> None:
    async def test(place: Place) -> None:
        headers = {"Authorization": "Bearer mine", "Cookie": "a=b"}
        async with place.session.get("/v1/models", headers=headers) as response:
            assert response.status == 200
        (got,) = [headers for engine in place.engines for headers in engine.headers]
        assert got["Authorization"] == "Bearer mine"
        assert "Cookie" not in got

    behind_a_proxy(test)
