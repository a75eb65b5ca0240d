"""What SGLang's operators do and see: its own test of a storage, attaching it, its metrics."""

from __future__ import annotations

import json
import re
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.engine.plain import Texts
from tests.sglang.children import AUTHORIZED, PAGE, Server
from tests.sglang.place import ADMIN, Place, await_stored, pages


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    with Place(tiny_llama) as place:
        place.server({**ADMIN, "enable-metrics": True})
        yield place


@pytest.fixture
def server(place: Place) -> Iterator[Server]:
    server = place.servers[0]
    server.flush()
    yield server
    assert "Traceback" not in server.said
    place.check()


def test_sglangs_own_test_of_a_storage_passes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = requests.Session.request

    def with_the_key(session: requests.Session, *arguments: Any, **options: Any) -> Any:
        return ask(session, *arguments, **{**options, "headers": AUTHORIZED})

    monkeypatch.setattr(requests.Session, "request", with_the_key)
    kit = pytest.importorskip("sglang.test.kits.unified_radix_cache_kit")

    class Prefetch(kit.AccuracyTwoPassMixin, unittest.TestCase):  # type: ignore[name-defined]
        base_url = server.url
        l3_prefetch_page_size = PAGE

    result = unittest.TestResult()
    server.wait()
    Prefetch("test_l3_prefetch_full_prefix_hit_after_flush").run(result)
    assert result.testsRun == 1
    assert not [*result.errors, *result.failures, *result.skipped]


def values(server: Server) -> dict[str, float]:
    """Its metrics that count, by name, without labels."""
    found: dict[str, float] = {}
    for line in server.get("/metrics").splitlines():
        if match := re.match(r"(sglang:\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


def test_its_metrics_show_what_was_stored_and_loaded(
    place: Place, server: Server, texts: Texts
) -> None:
    (prompt,) = texts.of(1000)
    before = values(server)
    with await_stored(place.node, pages(1008)):
        server.ask(prompt)
    server.flush()
    assert server.ask(prompt).loaded == pages(1000)
    server.ask(prompt)
    after = values(server)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("sglang:backuped_tokens_total") == pages(1008)
    assert grown("sglang:prefetched_tokens_total") == pages(1000)
    assert grown("sglang:prefetch_pgs_sum") == pages(1000) // PAGE
    assert grown("sglang:backup_pgs_sum") == pages(1008) // PAGE


def test_a_storage_is_detached_and_attached_over_http(
    place: Place, server: Server, texts: Texts
) -> None:
    (prompt,) = texts.of(700)
    with await_stored(place.node, pages(708)):
        first = server.ask(prompt)
    place.detach(server)
    server.flush()
    assert server.ask(prompt).cached == 0
    place.attach(server)
    told = json.loads(server.get("/hicache/storage-backend"))
    assert told["hicache_storage_backend"] == "dynamic"
    server.flush()
    again = server.ask(prompt)
    assert again.loaded == pages(700)
    assert again[:2] == first[:2]


def test_clearing_its_storage_leaves_what_others_share(
    place: Place, server: Server, texts: Texts
) -> None:
    (prompt,) = texts.of(700)
    with await_stored(place.node, pages(708)):
        server.ask(prompt)
    server.post("/hicache/storage-backend/clear", {})
    server.flush()
    assert server.ask(prompt).loaded == pages(700)
    assert "use `kvstrata clear`" in server.log
    place.node.clear()
    server.flush()
    assert server.ask(prompt).cached == 0
