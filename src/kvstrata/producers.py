"""Which engine computed an object, in front of what its codec needs: ``docs/format.md``."""

from __future__ import annotations

from kvstrata.errors import UsageError
from kvstrata.header import ObjectHeader

MAX_PRODUCER = 32
UNKNOWN = "a lossy codec"
"""Of a portable object whose producer nobody named: a codec has made it out of an engine's own."""

_FIRST = 255
"""No codec's parameters begin with it: it would be the codec's version."""


def with_producer(producer: str, parameters: bytes = b"") -> bytes:
    """A header's ``codec_parameters``.

    Args:
        producer: the engine that computed the object, printable ASCII without spaces, 32 characters
            at most; empty: nobody said.
        parameters: what its codec needs to decode it.
    Raises:
        UsageError: it is no such name.
    """
    if not producer:
        return parameters
    if len(producer) > MAX_PRODUCER or not _is_plain(producer):
        raise UsageError(
            f"producer {producer[:64]!r}: expected at most {MAX_PRODUCER} characters of printable "
            "ASCII without spaces"
        )
    return bytes([_FIRST, len(producer)]) + producer.encode() + parameters


def apart(codec_parameters: bytes) -> tuple[str, bytes]:
    """The producer that a header names, or none, and what its codec needs."""
    if len(codec_parameters) > 1 and codec_parameters[0] == _FIRST:
        end = 2 + codec_parameters[1]
        producer = codec_parameters[2:end].decode("ascii", "replace")
        if 0 < len(producer) == codec_parameters[1] <= MAX_PRODUCER and _is_plain(producer):
            return producer, codec_parameters[end:]
    return "", codec_parameters


def origin(header: ObjectHeader) -> str:
    """The engine that computed an object."""
    if header.kind == "native":
        return header.order.partition("/")[0]
    return apart(header.codec_parameters)[0] or UNKNOWN


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
