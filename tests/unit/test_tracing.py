"""Traces: who is traced, which spans a node makes, and that a collector can read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.nodes import NAMESPACE, ORDER, RAW, at_once, chunk_keys, template, until, write
from tests.support.real_nodes import on_real_node
from tests.support.traces import Collector, Traced, collecting

from kvstrata.errors import ConfigError, UsageError
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.observe import tracing
from kvstrata.observe.tracing import TRACEPARENT_CHARS, Tracer, checked, spanning
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

ME = Client("pid 1")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    return Traced(monkeypatch)


def options(folder: Path) -> dict[str, Any]:
    return {
        "disk.path": str(folder / "disk"), "disk.capacity": "4MiB", "canary": "off",
        "tracing.endpoint": "http://127.0.0.1:1/v1/traces",
    }  # fmt: skip


async def store(node: Node, keys: list[bytes], traceparent: str) -> None:
    request = p.Reserve(1, NAMESPACE, b"".join(keys), 0, 0, template(), traceparent=traceparent)
    reserved = at_once(node.reserve(ME, request))
    sums = write(node, keys, list(offsets_of(reserved.offsets)))
    at_once(node.commit(ME, p.Commit(2, reserved.reservation, b"".join(sums))))
    await node.movement.flush()


async def load(node: Node, keys: list[bytes], traceparent: str) -> None:
    request = p.Match(1, b"".join(keys), [0], [ORDER], [RAW], traceparent=traceparent)
    matched = at_once(node.match(ME, request))
    lease = node.leases[matched.lease]
    await until(lambda: lease.ready == len(matched.tiers) or lease.failed)
    node.release(ME, p.Release(matched.lease))


def test_a_nodes_spans_are_children_of_who_waits(traced: Traced, tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await until(lambda: node.backings[0].state == "ok")
        keys = chunk_keys(3)
        await store(node, keys, PARENT)
        await node.clear(ME, p.Clear(1, None, ["host"]))
        await load(node, [*keys, *chunk_keys(2, 9)], PARENT)
        assert traced.names() == ["disk.read", "disk.write", "node.commit", "node.match"]
        for span in traced.spans:
            assert f"{span.context.trace_id:032x}" == TRACE
            assert f"{span.parent.span_id:016x}" == SPAN
            assert span.start_time <= span.end_time
            assert span.resource.attributes["service.name"] == "kvstrata-node"
        written, read = traced.one("disk.write").attributes, traced.one("disk.read").attributes
        assert written["kvstrata.objects"] == read["kvstrata.objects"] == 3
        assert written["kvstrata.bytes"] == read["kvstrata.bytes"] == 3 * 12288
        assert read["kvstrata.not_come"] == 0

    on_real_node(test, options(tmp_path))


def test_what_is_not_traced_makes_no_span(traced: Traced, tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await until(lambda: node.backings[0].state == "ok")
        keys = chunk_keys(3)
        await store(node, keys, "")
        await node.clear(ME, p.Clear(1, None, ["host"]))
        await load(node, keys, "")
        assert traced.names() == []

    on_real_node(test, options(tmp_path))


def test_what_does_not_come_is_told(traced: Traced, tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await until(lambda: node.backings[0].state == "ok")
        keys = chunk_keys(3)
        await store(node, keys, "")
        for file in (tmp_path / "disk").rglob("*"):
            if file.is_file() and file.stat().st_size == 12288:
                file.unlink()
        await node.clear(ME, p.Clear(1, None, ["host"]))
        await load(node, keys, PARENT)
        await until(lambda: "disk.read" in traced.names())
        about = traced.one("disk.read").attributes
        assert about["kvstrata.not_come"] == 3
        assert about["kvstrata.objects"] == about["kvstrata.bytes"] == 0

    on_real_node(test, options(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    ["x", PARENT[:-1], PARENT + "0", PARENT.upper(), f"00-{'0' * 32}-{SPAN}-01",
     f"00-{TRACE}-{'0' * 16}-01", f"01-{TRACE}-{SPAN}-01", "\0" * TRACEPARENT_CHARS],
)  # fmt: skip
def test_a_node_refuses_what_is_no_parent(wrong: str, tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        with pytest.raises(UsageError, match="traceparent"):
            node.match(ME, p.Match(1, bytes(32), [0], [ORDER], traceparent=wrong))
        keys = chunk_keys(1)
        with pytest.raises(UsageError, match="traceparent"):
            at_once(
                node.reserve(
                    ME, p.Reserve(1, NAMESPACE, keys[0], 0, 0, template(), traceparent=wrong)
                )
            )
        node.check_integrity()

    on_real_node(test, {"canary": "off"})
    assert checked(PARENT) == PARENT


# who is traced


def flags(value: int) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{SPAN}-{value:02x}"}


@given(st.integers(0, 255))
def test_a_parent_decides(value: int) -> None:
    for ratio in (0.0, 1.0):
        begun = Tracer("test", ratio).begins(flags(value))
        assert begun == (flags(value)["traceparent"] if value & 1 else None)


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": "nonsense"}, {"tracestate": "a=b"}])
def test_without_a_parent_chance_decides(headers: dict[str, str] | None) -> None:
    assert {Tracer("test", 1.0).begins(headers) for _ in range(20)} == {""}
    assert {Tracer("test", 0.0).begins(headers) for _ in range(20)} == {None}
    some = [Tracer("test", 0.5).begins(headers) for _ in range(200)]
    assert 0 < some.count("") < 200


def test_without_a_tracer_or_a_parent_there_is_no_span(traced: Traced) -> None:
    tracer = Tracer.to("http://x", 1.0, "test")
    for one, parent in ((None, PARENT), (tracer, ""), (None, "")):
        with spanning(one, "kvstrata.x", parent) as traceparent:
            assert traceparent == ""
    assert traced.names() == []

    def fail() -> None:
        with spanning(tracer, "kvstrata.x", PARENT) as traceparent:
            assert traceparent[3:35] == TRACE
            raise ValueError("so")

    with pytest.raises(ValueError, match="so"):
        fail()
    assert traced.one("x").status.description == "so"


def test_off_is_off() -> None:
    assert Tracer.to("off", 1.0, "test") is None


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'kvstrata[tracing]'")):
        Tracer.to("http://127.0.0.1:1", 1.0, "test")


# a collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as started:
        yield started


def test_spans_come_to_a_collector_before_a_node_ends(collector: Collector, tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await store(node, chunk_keys(2), PARENT)

    on_real_node(test, {**options(tmp_path), "tracing.endpoint": collector.url})
    assert {(one.service, one.name) for one in collector.spans} == {
        ("kvstrata-node", "kvstrata.node.commit"),
        ("kvstrata-node", "kvstrata.disk.write"),
    }
    for one in collector.spans:
        assert (one.span.trace_id.hex(), one.span.parent_span_id.hex()) == (TRACE, SPAN)
        assert 0 < one.span.start_time_unix_nano <= one.span.end_time_unix_nano
    (written,) = [one for one in collector.spans if one.name == "kvstrata.disk.write"]
    assert (written.about["kvstrata.objects"], written.about["kvstrata.bytes"]) == (2, 2 * 12288)


def test_the_environment_may_say_where(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url)
    tracer = Tracer.to("env", 1.0, "test")
    assert tracer is not None
    tracer.start("kvstrata.x").end(tokens=3)
    tracer.close()
    (one,) = collector.spans
    assert (one.service, one.name, one.about) == ("test", "kvstrata.x", {"kvstrata.tokens": 3})


def test_nobody_at_the_other_end_keeps_no_node_from_ending(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracing, "EXPORT_S", 0.2)

    async def test(node: Node) -> None:
        await store(node, chunk_keys(2), PARENT)

    on_real_node(test, options(tmp_path))
