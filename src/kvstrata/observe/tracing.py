"""Traces: what a request waited for, as spans of OpenTelemetry, from the engine to each tier.

Who begins a trace decides whether it is sampled; where it is not, nobody makes a span, and no
message carries anything. The library is imported when a tracer is made, and nothing of it is set
for the whole process.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from kvstrata.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

R = TypeVar("R")

TRACEPARENT_CHARS = 55
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
SAMPLED = 1

OFF, BY_ENVIRONMENT = "off", "env"
EXPORT_S = 3.0
"""For sending some spans, and for how long the end of a program waits for that."""


def checked(traceparent: str) -> str:
    """A parent as W3C Trace Context writes it, or "" for none.

    Raises:
        UsageError: it is something else.
    """
    if traceparent and not _TRACEPARENT.fullmatch(traceparent):
        raise UsageError("a traceparent is 55 characters: 00, trace, span, flags")
    return traceparent


class Span:
    """One span, from `Tracer.start` to `end`."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any) -> None:
        context = span.get_span_context()
        #: names it as the parent of others, in whatever process
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
        self._span = span

    def end(self, *, failed: str = "", **attributes: str | float | bool) -> None:
        """End it; once.

        Args:
            failed: why it did not do what it should; empty: it did.
            attributes: below ``kvstrata.``; with a unit in the name.
        """
        for name, value in attributes.items():
            self._span.set_attribute(f"kvstrata.{name}", value)
        if failed:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failed))
        self._span.end()


class Tracer:
    """Makes spans and sends them. Thread-safe.

    Args:
        service: name of the program, such as ``kvstrata-node``.
        ratio: of the traces that begin here, how many are sampled.
        processors: take the spans that have ended.
    """

    def __init__(self, service: str, ratio: float, *processors: SpanProcessor) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        resource = Resource.create({"service.name": service, "process.pid": os.getpid()})
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        for processor in processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvstrata")
        self._trace = trace
        self._nowhere = Context()  # not what happens to be current in this thread
        self._ratio = ratio

    @classmethod
    def to(cls, endpoint: str, ratio: float, service: str) -> Tracer | None:
        """A tracer that sends to a collector by OTLP over HTTP; None where it is off.

        Args:
            endpoint: ``off``, ``env`` (as the variables OTEL_EXPORTER_OTLP_* say), or a URL.
            ratio: of the traces that begin here, how many are sampled.
            service: name of the program.

        Raises:
            ConfigError: the library is not installed.
        """
        if endpoint == OFF:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(
                "tracing.endpoint", f"{error}: pip install 'kvstrata[tracing]'"
            ) from error
        url = None if endpoint == BY_ENVIRONMENT else endpoint
        return cls(
            service, ratio, BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_S))
        )

    def begins(self, headers: Mapping[str, str] | None) -> str | None:
        """Whether a request is traced: its parent, "" where it begins the trace; None: it is not.

        Args:
            headers: of the request, where it came with some; a parent in them decides.
        """
        if headers and (found := _TRACEPARENT.fullmatch(headers.get("traceparent", ""))):
            return found.group() if int(found[3], 16) & SAMPLED else None
        return "" if random.random() < self._ratio else None

    def start(self, name: str, parent: str = "", *, ago_s: float = 0.0) -> Span:
        """Begin a span.

        Args:
            name: what it is of.
            parent: traceparent; empty: it begins a trace.
            ago_s: how long ago it began.
        """
        context = None
        if found := _TRACEPARENT.fullmatch(parent):
            remote = self._trace.SpanContext(
                int(found[1], 16), int(found[2], 16), True, self._trace.TraceFlags(SAMPLED)
            )
            context = self._trace.set_span_in_context(self._trace.NonRecordingSpan(remote))
        begun = time.time_ns() - int(ago_s * 1e9)
        span = self._tracer.start_span(name, context or self._nowhere, start_time=begun)
        return Span(span)

    def close(self) -> None:
        """Send what has ended, for a few seconds at most. Repeatable."""
        self._provider.shutdown()


@contextmanager
def spanning(tracer: Tracer | None, name: str, parent: str) -> Iterator[str]:
    """Do something in a span, and have its traceparent; "" where there is no tracer or parent."""
    if tracer is None or not parent:
        yield ""
        return
    span = tracer.start(name, parent)
    try:
        yield span.traceparent
    except BaseException as error:
        span.end(failed=str(error) or type(error).__name__)
        raise
    span.end()


def around(
    tracer: Tracer | None, name: str, parent: str, work: Callable[[], R | Awaitable[R]]
) -> R | Awaitable[R]:
    """Do something, answered at once or later; in a span where there is a tracer and a parent."""
    if tracer is None or not parent:
        return work()
    span = tracer.start(name, parent)
    try:
        answer = work()
    except Exception as error:
        span.end(failed=str(error))
        raise
    if isinstance(answer, Awaitable):
        return _end_with(span, answer)
    span.end()
    return answer


async def _end_with(span: Span, answer: Awaitable[R]) -> R:
    try:
        result = await answer
    except BaseException as error:
        span.end(failed=str(error) or type(error).__name__)
        raise
    span.end()
    return result
