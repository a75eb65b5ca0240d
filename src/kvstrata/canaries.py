"""Canaries: chunks of random bytes that are stored to see whether they come back.

They have a namespace of their own, so no request can hit them.
"""

from __future__ import annotations

import secrets
import time

import numpy as np

from kvstrata.errors import CorruptObject, Incompatible
from kvstrata.header import ObjectHeader, object_id
from kvstrata.keys import KeyChain, Namespace
from kvstrata.objects import HEADER_BYTES, checksum, encode, verify_object

PART = 0
ORDER = "portable"
CHUNK_TOKENS = 128


class Canaries:
    """Some chunks, and what they should be.

    Args:
        secret: the keys derive from it, 32 bytes.
        num_chunks: how many.
        payload_bytes: bytes of each chunk's payload.
    """

    def __init__(self, secret: bytes, num_chunks: int, payload_bytes: int) -> None:
        self.payload_bytes = payload_bytes
        random = np.random.default_rng()
        self.payloads = random.integers(0, 256, (num_chunks, payload_bytes), np.uint8)
        self.namespace = Namespace(
            model=f"kvstrata canary {secrets.token_hex(16)}",
            layout=f"{payload_bytes} random bytes",
            chunk_tokens=CHUNK_TOKENS,
        ).digest()
        chain = KeyChain(secret, self.namespace, CHUNK_TOKENS)
        self.keys = chain.keys(random.integers(0, 1 << 16, num_chunks * CHUNK_TOKENS))

    def write(self, number: int, into: memoryview, created_ns: int = 0) -> None:
        """Make a chunk's object, header and all, in as many bytes as it takes.

        Args:
            number: of the chunk.
            into: so many bytes.
            created_ns: when, nanoseconds since 1970; 0: now.
        """
        payload = self.payloads[number].data
        made = checksum(payload)
        header = ObjectHeader(
            namespace=self.namespace,
            key=self.keys[number],
            parent=self.keys[number - 1] if number else bytes(32),
            start=number * CHUNK_TOKENS,
            num_tokens=CHUNK_TOKENS,
            group=PART >> 16,
            rank=PART & 0xFFFF,
            kind="portable",
            order="",
            dtype="uint8",
            shape=(self.payload_bytes,),
            codec="raw",
            codec_parameters=b"",
            epoch=0,
            created_ns=created_ns or time.time_ns(),
            raw_length=self.payload_bytes,
            stored_length=self.payload_bytes,
            raw_checksum=made,
            stored_checksum=made,
            chunk_tokens=CHUNK_TOKENS,
        )
        end = HEADER_BYTES + self.payload_bytes
        into[:HEADER_BYTES] = encode(header)
        into[HEADER_BYTES:end] = payload
        into[end:] = bytes(len(into) - end)

    def is_right(self, number: int, data: memoryview) -> bool:
        """Whether these bytes are the object of a chunk, as it was stored."""
        try:
            verify_object(data, object_id(self.keys[number], PART >> 16, PART & 0xFFFF))
        except (CorruptObject, Incompatible):
            return False
        payload = data[HEADER_BYTES : HEADER_BYTES + self.payload_bytes]
        return bool(payload == self.payloads[number].data)
