"""Where traces go, and how many requests are traced."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kvstrata.config import kinds
from kvstrata.config.parts import option
from kvstrata.errors import ConfigError
from kvstrata.observe.tracing import BY_ENVIRONMENT, OFF, Tracer

logger = logging.getLogger(__name__)


def _endpoint(value: Any) -> str:
    # It may hold a password, so that no error repeats it.
    if value in (OFF, BY_ENVIRONMENT):
        return str(value)
    if not isinstance(value, str) or not re.fullmatch(r"https?://[\x21-\x7e]+", value):
        raise ValueError("what it is given is no URL")
    return value


ENDPOINT = kinds.Kind(
    _endpoint,
    str,
    '"off", "env", or a URL such as "http://127.0.0.1:4318/v1/traces"',
    lambda value: re.sub("//[^/@]*@", "//...@", value),
)


@dataclass(frozen=True)
class TracingConfig:
    """Traces of requests by OpenTelemetry, see docs/tracing.md."""

    endpoint: str = option(
        ENDPOINT,
        OFF,
        "Where spans are sent by OTLP over HTTP; `env`: where OTEL_EXPORTER_OTLP_ENDPOINT says.",
        shared=True,
    )
    sample: Fraction = option(  # noqa: RUF009 - it calls field()
        kinds.SHARE,
        "1%",
        "Of the requests that come without a trace of their own, how many are traced.",
        shared=True,
    )


def open_tracer(config: TracingConfig, service: str) -> Tracer | None:
    """The tracer of a program; None where there is none, which the log says if one was wanted."""
    try:
        return Tracer.to(config.endpoint, float(config.sample), service)
    except ConfigError as error:
        logger.error("requests are not traced: %s", error)
        return None
