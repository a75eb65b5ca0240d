"""Spans of a test: kept in memory instead of sent, or taken by a collector of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvstrata.observe.tracing import OFF, Tracer


class Traced:
    """Everything that is traced while it lasts, by whichever program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._exporter = InMemorySpanExporter()

        def to(endpoint: str, ratio: float, service: str) -> Tracer | None:
            if endpoint == OFF:
                return None
            return Tracer(service, ratio, SimpleSpanProcessor(self._exporter))

        monkeypatch.setattr(Tracer, "to", staticmethod(to))

    @property
    def spans(self) -> Sequence[Any]:
        """Those that have ended."""
        spans: Sequence[Any] = self._exporter.get_finished_spans()
        return spans

    def names(self) -> list[str]:
        """Their names, without the prefix they share, sorted."""
        return sorted(span.name.removeprefix("kvstrata.") for span in self.spans)

    def one(self, name: str) -> Any:
        """The only one of this name."""
        (span,) = [span for span in self.spans if span.name == f"kvstrata.{name}"]
        return span

    def parent(self, span: Any) -> str:
        """Name of a span's parent; empty: it has none, or one outside."""
        if span.parent is None:
            return ""
        found = [
            one.name.removeprefix("kvstrata.")
            for one in self.spans
            if one.context.span_id == span.parent.span_id
        ]
        return found[0] if found else "outside"


class Sent(NamedTuple):
    """One span as it came to a collector.

    Args:
        service: who made it.
        pid: in which process.
        span: OTLP's own message.
    """

    service: str
    pid: int
    span: Any

    @property
    def name(self) -> str:
        """The span's."""
        name: str = self.span.name
        return name

    @property
    def about(self) -> dict[str, Any]:
        """Its attributes."""
        return _values(self.span.attributes)


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, and decodes them with OpenTelemetry's own definition."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Sent] = []

    @property
    def url(self) -> str:
        """Where spans are sent."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/x-protobuf"
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            who = _values(one.resource.attributes)
            service, pid = who["service.name"], who["process.pid"]
            for scope in one.scope_spans:
                self.server.spans += [Sent(service, pid, span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector, as long as the context lasts."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
