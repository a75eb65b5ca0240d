"""Spans of a test, kept in memory instead of sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
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
