"""Signposts: found by their text alone, believed only if somebody with the secret wrote them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend.signposts import Signpost, Signposts, covering
from kvstrata.errors import CorruptObject, Incompatible, KVStrataError, UsageError
from kvstrata.keys import Namespace

CHUNK = 8
SECRET = bytes(range(32))
SPACE = Namespace("a-model", "a layout", CHUNK).digest()
POSTS = Signposts(SECRET, SPACE, CHUNK)
TEXT = list(range(100, 120))
KEY = POSTS.key(TEXT)


def keys(count: int) -> tuple[bytes, ...]:
    return tuple(bytes([i + 1]) * 32 for i in range(count))


PAYLOAD = POSTS.encode(KEY, Signpost(13, keys(4)), len(TEXT))


@given(st.integers(0, 1 << 40), st.integers(1, 60), st.data())
def test_it_comes_back_as_it_was(start: int, num_tokens: int, data: st.DataObject) -> None:
    most = len(covering(range(start, start + num_tokens), CHUNK))
    post = Signpost(start, keys(data.draw(st.integers(1, most))))
    payload = POSTS.encode(KEY, post, num_tokens)
    assert len(payload) == POSTS.payload_bytes(num_tokens)
    assert POSTS.decode(KEY, payload, num_tokens) == post


@given(st.integers(1, 200))
def test_its_length_is_that_of_the_most_chunks_a_text_can_touch(num_tokens: int) -> None:
    most = max(len(covering(range(at, at + num_tokens), CHUNK)) for at in range(CHUNK))
    assert POSTS.payload_bytes(num_tokens) == 48 + 32 * most


def test_every_part_of_its_key_counts() -> None:
    others = [
        Signposts(bytes(32), SPACE, CHUNK).key(TEXT),
        Signposts(SECRET, bytes(32), CHUNK).key(TEXT),
        Signposts(SECRET, SPACE, CHUNK, "alice").key(TEXT),
        POSTS.key(TEXT[1:]),
        POSTS.key([*TEXT, 0]),
        POSTS.key([*TEXT[:-1], 0]),
    ]
    assert len({KEY, *others}) == 7
    assert Signposts(SECRET, SPACE, CHUNK).key(TEXT) == KEY


def test_every_flipped_bit_is_noticed() -> None:
    for bit in range(8 * len(PAYLOAD)):
        damaged = bytearray(PAYLOAD)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptObject, Incompatible)):
            POSTS.decode(KEY, bytes(damaged), len(TEXT))


@given(st.binary(max_size=300))
def test_whatever_was_stored_raises_nothing_else(payload: bytes) -> None:
    for padded in (payload, payload.ljust(len(PAYLOAD), b"\0")[: len(PAYLOAD)]):
        with pytest.raises((CorruptObject, Incompatible)):
            POSTS.decode(KEY, padded, len(TEXT))


def test_one_that_was_written_for_another_text_or_by_another_tenant_is_not_believed() -> None:
    salted = Signposts(SECRET, SPACE, CHUNK, "alice")
    for posts, key in ((POSTS, bytes(32)), (salted, KEY)):
        with pytest.raises(CorruptObject, match="nobody"):
            posts.decode(key, PAYLOAD, len(TEXT))
    with pytest.raises(CorruptObject, match="bytes for 3 tokens"):
        POSTS.decode(KEY, PAYLOAD, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"start": (1 << 40) + 1},
        {"keys": ()},
        {"keys": keys(5)},  # 20 tokens from 13 on are in 4 chunks
        {"keys": (keys(1)[0], keys(1)[0])},
        {"keys": (bytes(32),)},
        {"keys": (bytes(31),)},
    ],
)
def test_what_cannot_be_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        POSTS.encode(KEY, dataclasses.replace(Signpost(13, keys(4)), **change), len(TEXT))


def test_wrong_lengths_are_refused() -> None:
    for secret, space in ((b"", SPACE), (SECRET, b"")):
        with pytest.raises(KVStrataError):
            Signposts(secret, space, CHUNK)
    with pytest.raises(KVStrataError):
        Signposts(SECRET, SPACE, CHUNK, "\ud800")
