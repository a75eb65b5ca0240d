"""A request's trace, from vLLM's own context through the connector and the node to a tier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.connector.fake_model import CHUNK
from tests.connector.rig import Rig, prompt
from tests.support.traces import Traced

from kvstrata.node.node import Node

Make = Callable[..., Rig]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=b"}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    return Traced(monkeypatch)


def traced_rig(make_rig: Make, sample: str, **more: object) -> Rig:
    tracing = {"tracing.endpoint": "http://127.0.0.1:1", "tracing.sample": sample}
    return make_rig(extra={**tracing, **more})


def ask(rig: Rig, tokens: list[int], headers: dict[str, str] | None) -> None:
    rig.ask(tokens, trace_headers=headers)
    rig.settle()
    assert rig.node is not None
    rig.node.run(lambda: _flush(rig))


async def _flush(rig: Rig) -> None:
    assert rig.node is not None
    node: Node = rig.node.node
    await node.movement.flush()


def test_a_trace_goes_from_vllms_context_to_the_tier(make_rig: Make, traced: Traced) -> None:
    rig = traced_rig(make_rig, "0.0001%")
    tokens = prompt(3 * CHUNK)
    ask(rig, tokens, HEADERS)
    rig.until(lambda: "store" in traced.names())
    assert {name: traced.parent(traced.one(name)) for name in traced.names()} == {
        "request": "outside",
        "lookup": "request",
        "node.match": "lookup",
        "store": "request",
        "node.commit": "store",
    }
    assert {f"{span.context.trace_id:032x}" for span in traced.spans} == {TRACE}
    assert f"{traced.one('request').parent.span_id:016x}" == SPAN
    about = traced.one("request").attributes
    assert about["kvstrata.prompt_tokens"] == 3 * CHUNK
    assert about["kvstrata.miss"] == "not stored"
    rig.check()


def test_a_hit_has_its_load_and_the_tiers_read(make_rig: Make, traced: Traced) -> None:
    rig = traced_rig(make_rig, "0.0001%", **{"memory.capacity": "4MiB", "memory.codec": "raw"})
    tokens = prompt(200)
    ask(rig, tokens, HEADERS)
    rig.until(lambda: "store" in traced.names())
    written = traced.one("memory.write")
    assert traced.parent(written) == "store"
    assert written.attributes["kvstrata.objects"] == 200 // CHUNK
    rig.reset()
    rig.drop_host()
    ask(rig, tokens, None)
    assert len(traced.spans) == 6, "the second one is not traced"
    rig.reset()
    rig.drop_host()
    ask(rig, tokens, {"traceparent": f"00-{'1' * 32}-{SPAN}-01"})
    second = [one for one in traced.spans if f"{one.context.trace_id:032x}" == "1" * 32]
    assert {one.name.removeprefix("kvstrata."): traced.parent(one) for one in second} == {
        "request": "outside",
        "lookup": "request",
        "node.match": "lookup",
        "memory.read": "lookup",
        "load": "request",
    }
    found = {one.name.removeprefix("kvstrata."): one.attributes for one in second}
    assert found["memory.read"]["kvstrata.objects"] == 200 // CHUNK
    assert found["load"]["kvstrata.tiers"] == "memory"
    assert found["lookup"]["kvstrata.chunks"] == 200 // CHUNK
    assert found["request"]["kvstrata.loaded_tokens"] == 200 // CHUNK * CHUNK
    rig.check()


def test_chance_decides_without_a_context(make_rig: Make, traced: Traced) -> None:
    rig = traced_rig(make_rig, "100%")
    ask(rig, prompt(2 * CHUNK), None)
    rig.reset()
    ask(rig, prompt(2 * CHUNK), None)
    roots = [span for span in traced.spans if span.name == "kvstrata.request"]
    assert len({span.context.trace_id for span in roots}) == 2
    assert all(span.parent is None for span in roots)
    load = traced.one("load")
    assert traced.parent(load) == "request"
    assert load.attributes["kvstrata.tokens"] == 2 * CHUNK - 1
    assert load.attributes["kvstrata.tiers"] == "host"
    rig.check()


def test_what_its_context_does_not_sample_is_not_traced(make_rig: Make, traced: Traced) -> None:
    rig = traced_rig(make_rig, "100%")
    ask(rig, prompt(2 * CHUNK), {"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert traced.names() == []
    rig.check()


def test_off_is_off(make_rig: Make, traced: Traced) -> None:
    rig = make_rig()
    ask(rig, prompt(2 * CHUNK), HEADERS)
    assert traced.names() == []
    rig.check()
