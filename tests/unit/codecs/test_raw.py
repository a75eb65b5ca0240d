"""`raw` keeps the contract: the interface holds together."""

from __future__ import annotations

from kvstrata.codecs.raw import Raw
from kvstrata.testing.codecs import CodecContract


class TestRaw(CodecContract):
    codec = Raw()
