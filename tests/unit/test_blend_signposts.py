"""Signposts: found by their text alone, believed only if somebody with the secret wrote them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.blend.anchors import sketch
from kvstrata.blend.signposts import PLACES, Signpost, Signposts, covering
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


BEFORE = sketch(range(70))
PLACE_KEY = POSTS.key(TEXT, 2)
PLACE = POSTS.encode(PLACE_KEY, Signpost(13, keys(4), BEFORE), len(TEXT))


@given(st.integers(1, 60), st.integers(1, PLACES), st.binary(min_size=64, max_size=64))
def test_a_place_says_what_came_before(num_tokens: int, place: int, before: bytes) -> None:
    post, key = Signpost(3, keys(1), before), POSTS.key(range(num_tokens), place)
    payload = POSTS.encode(key, post, num_tokens)
    assert len(payload) == POSTS.payload_bytes(num_tokens, place)
    assert POSTS.decode(key, payload, num_tokens, place) == post


def test_who_lacks_the_secret_learns_nothing_of_what_came_before() -> None:
    """Not even whether it was the same: of equal sketches equal bytes are chance."""
    other = POSTS.encode(PLACE_KEY, Signpost(13, keys(3), BEFORE), len(TEXT))
    salted = Signposts(SECRET, SPACE, CHUNK, "alice")
    third = salted.encode(PLACE_KEY, Signpost(13, keys(4), BEFORE), len(TEXT))
    for one, two in ((PLACE, other), (PLACE, third), (other, third)):
        pairs = zip(one[48:112], two[48:112], strict=True)
        assert sum(a == b for a, b in pairs) < 8
    assert sum(a == b for a, b in zip(PLACE[48:112], BEFORE, strict=True)) < 8


def test_of_a_prompt_the_place_is_the_same_and_all_are_used() -> None:
    each = [Signpost(0, (bytes([n, 7 * n % 256, 3, 4]) * 8,)).place for n in range(1, 200)]
    assert set(each) == set(range(1, PLACES + 1))
    assert min(each.count(place) for place in set(each)) > 40
    assert Signpost(5, keys(4)).place == Signpost(9, keys(2), BEFORE).place


def test_a_place_is_not_taken_for_the_text_nor_for_another_place() -> None:
    for place, key, payload in ((0, KEY, PLACE), (2, PLACE_KEY, PAYLOAD)):
        with pytest.raises(CorruptObject, match="bytes for 20 tokens"):
            POSTS.decode(key, payload, len(TEXT), place)
    for payload in (PAYLOAD + bytes(64), PAYLOAD[:48] + bytes(64) + PAYLOAD[48:]):
        with pytest.raises(Incompatible, match="version 1"):
            POSTS.decode(PLACE_KEY, payload, len(TEXT), 2)
    with pytest.raises(CorruptObject, match="nobody"):
        POSTS.decode(POSTS.key(TEXT, 1), PLACE, len(TEXT), 1)


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
        *(POSTS.key(TEXT, place) for place in (1, 2, 3)),
        POSTS.key([*TEXT, 1]),
    ]
    assert len({KEY, *others}) == 11
    assert Signposts(SECRET, SPACE, CHUNK).key(TEXT) == KEY


@pytest.mark.parametrize(("place", "key", "payload"), [(0, KEY, PAYLOAD), (2, PLACE_KEY, PLACE)])
def test_every_flipped_bit_is_noticed(place: int, key: bytes, payload: bytes) -> None:
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptObject, Incompatible)):
            POSTS.decode(key, bytes(damaged), len(TEXT), place)


@given(st.binary(max_size=300))
def test_whatever_was_stored_raises_nothing_else(payload: bytes) -> None:
    for padded in (payload, payload.ljust(len(PAYLOAD), b"\0")[: len(PAYLOAD)]):
        with pytest.raises((CorruptObject, Incompatible)):
            POSTS.decode(KEY, padded, len(TEXT))
    with pytest.raises((CorruptObject, Incompatible)):
        POSTS.decode(PLACE_KEY, payload.ljust(len(PLACE), b"\0")[: len(PLACE)], len(TEXT), 2)


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
        {"before": bytes(63)},
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
