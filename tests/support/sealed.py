"""Encrypted objects for tests, good ones and forged ones, and nodes that store them."""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.support.nodes import NAMESPACE, ORDER, arrive, payload, release, store, stored_payload

from kvstrata.codecs import codec_named
from kvstrata.codecs.base import Payload
from kvstrata.header import SEALED_BYTES, ObjectHeader
from kvstrata.node.coding.recoding import (
    encoded_object,
    restored_object,
    sealed_object,
)
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode, encode, stored_bytes, verify_object
from kvstrata.testing.codecs import kv_like
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

KEY, OTHER = b"k" * 32, b"o" * 32
SHAPE = (2, 2, 3, 32, 64)
CODECS = ("raw", "lossless", "int8", "cachegen-2")


def memory(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))[:nbytes]


def an_object(raw: bytes, **changes: object) -> memoryview:
    """A whole raw object."""
    fields = {
        "namespace": b"n" * 32,
        "key": b"c" * 32,
        "parent": b"p" * 32,
        "start": 128,
        "num_tokens": 32,
        "group": 0,
        "rank": 1,
        "kind": "portable",
        "order": "",
        "dtype": "bfloat16",
        "shape": SHAPE,
        "codec": "raw",
        "codec_parameters": b"",
        "epoch": 7,
        "created_ns": 11,
        "raw_length": len(raw),
        "stored_length": len(raw),
        "raw_checksum": checksum(raw),
        "stored_checksum": checksum(raw),
        "chunk_tokens": 128,
        "owner": b"w" * 16,
        "marks": b"m" * 24,
    }
    header = ObjectHeader(**{**fields, **changes})  # type: ignore[arg-type]
    data = memory(stored_bytes(len(raw)))
    data[:HEADER_BYTES] = encode(header)
    data[HEADER_BYTES : HEADER_BYTES + len(raw)] = raw
    return data


def kv(seed: int = 0) -> bytes:
    return kv_like(Payload(SHAPE, "bfloat16", 128), seed).tobytes()


def encoded(codec: str, whole: memoryview, level: int = 0) -> memoryview:
    """An object as a tier with this codec keeps it."""
    if codec == "raw":
        return whole
    made = encoded_object(codec_named(codec), whole, Scratch(1), level)
    assert made is not None
    return made.data


def sealed(whole: memoryview, *keys: bytes) -> memoryview:
    """As a tier with these keys keeps it."""
    return sealed_object(KeyRing(keys or [KEY]), whole, Scratch(1)).data


def opened(data: memoryview, *keys: bytes) -> memoryview:
    """What `KeyRing.open` makes of an object that passes every check without a key."""
    header = verify_object(data, decode(data).object_id)
    into = memory(stored_bytes(header.stored_length - SEALED_BYTES))
    into[:] = b"\xff" * len(into)
    assert KeyRing(keys or [KEY]).open(header, data, into) == decode(into)
    return into


def restored(data: memoryview, into: memoryview, *keys: bytes) -> ObjectHeader:
    """What a read does with what it got for the object above."""
    name = decode(an_object(kv())).object_id
    return restored_object(data, name, into, KeyRing(keys or [KEY]), Scratch(2))


def forged(data: memoryview, **changes: object) -> memoryview:
    """The object with other fields, and with the checksums that go with them."""
    header = decode(data)
    there = memory(len(data))
    there[:] = data
    payload = there[HEADER_BYTES : HEADER_BYTES + header.stored_length]
    fields = {"stored_checksum": checksum(payload), **changes}
    there[:HEADER_BYTES] = encode(msgspec.structs.replace(header, **fields))
    return there


def tampered(data: bytes) -> bytes:
    """An encrypted object with another payload, as somebody would make it who knows the format."""
    changed = memory(len(data))
    changed[:] = data
    changed[HEADER_BYTES + 1000] ^= 1
    return bytes(forged(changed))


WHOLE = 4 * HEADER_BYTES
"""Of a payload that leaves no padding, so that encryption makes the object a page longer."""
NUM = 4
MISSES = 'incompatible_objects_total{tier="%s"}'
CORRUPT = 'corrupt_objects_total{tier="%s"}'

Test = Callable[[Node], Coroutine[Any, Any, None]]


def counted(node: Node, name: str, tier: str = "disk") -> float:
    return node.counters.snapshot().get(name % tier, 0)


def files(folder: Path) -> list[Path]:
    """Of the objects of a disk tier."""
    return sorted((folder / "objects").rglob("*.kvo"))


def put(node: Node, keys: Sequence[bytes]) -> None:
    assert store(node, Client("pid 1"), keys, nbytes=WHOLE) == len(keys)


async def get(node: Node, keys: Sequence[bytes]) -> int:
    """Load from below host memory, compare, and say how many chunks came."""
    client, ready = Client("pid 1"), 0
    for key in keys:
        node.host.drop(key, Cause.CLEARED)
    request = p.Match(1, b"".join(keys), [0], [ORDER], [WHOLE], namespace=NAMESPACE)
    answer = node.match(client, request)
    matched = await answer if isinstance(answer, Awaitable) else answer
    while ready < len(matched.tiers):
        arrived = await arrive(node, client, matched.lease, ready)
        for i, offset in enumerate(offsets_of(arrived.offsets), ready):
            assert stored_payload(node, offset, WHOLE) == payload(keys[i], nbytes=WHOLE)
        ready = arrived.ready
        if arrived.failed:
            break
    if matched.lease:
        release(node, client, matched.lease)
    return ready
