"""Encrypted objects that somebody changed, exchanged or made up: none is taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.sealed import (
    CODECS,
    KEY,
    an_object,
    encoded,
    forged,
    kv,
    memory,
    restored,
    sealed,
)

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import SEALED_BYTES, ObjectHeader
from kvstrata.node.coding.recoding import (
    checked_object,
    restored_object,
)
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.objects import HEADER_BYTES, decode, stored_bytes


@settings(deadline=None, max_examples=300)
@given(
    codec=st.sampled_from(CODECS), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
)
def test_no_bit_can_be_flipped(codec: str, where: float, bit: int) -> None:
    data = sealed(encoded(codec, an_object(kv())))
    data[int(where * len(data))] ^= 1 << bit
    with pytest.raises((CorruptObject, Incompatible)):
        restored(data, memory(len(an_object(kv()))))


@settings(deadline=None, max_examples=200)
@given(
    codec=st.sampled_from(CODECS), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7)
)
def test_no_bit_of_what_is_stored_can_be_flipped_by_whoever_makes_checksums(
    codec: str, where: float, bit: int
) -> None:
    data = sealed(encoded(codec, an_object(kv())))
    data[HEADER_BYTES + int(where * decode(data).stored_length)] ^= 1 << bit
    with pytest.raises(CorruptObject, match="not what was encrypted"):
        restored(forged(data), memory(len(an_object(kv()))))


FORGERIES: dict[str, object] = {
    "namespace": b"x" * 32,
    "key": b"x" * 32,
    "parent": b"x" * 32,
    "start": 0,
    "num_tokens": 33,
    "group": 1 << 12,
    "rank": 2,
    "kind": "native",
    "order": "vllm/cpu-vec/b32/bfloat16",
    "dtype": "float16",
    "shape": (2, 2, 32, 3, 64),
    "codec": "int4",
    "codec_parameters": b"\x02",
    "created_ns": 12,
    "raw_length": len(kv()) // 2,
    "raw_checksum": bytes(16),
    "chunk_tokens": 64,
    "owner": bytes(16),
    "group_kind": "sliding",
    "boundary": 64,
    "positions": b"x" * 16,
    "marks": b"",
}
TOGETHER: dict[str, dict[str, object]] = {
    "start": {"parent": bytes(32)},
    "kind": {"order": "vllm/cpu-vec/b32/bfloat16"},
    "order": {"kind": "native"},
    "group_kind": {"boundary": 64},
    "boundary": {"group_kind": "chunked"},
    "positions": {"kind": "kept", "group_kind": "recurrent", "boundary": 160},
}
WHERE_IT_IS_STORED = ("epoch", "stored_checksum", "stored_length", "encryption_key")


def test_every_field_is_tried() -> None:
    assert {*FORGERIES, *WHERE_IT_IS_STORED} == set(ObjectHeader.__struct_fields__)


@pytest.mark.parametrize("field", FORGERIES)
def test_no_field_can_be_changed_by_whoever_makes_checksums(field: str) -> None:
    plain = encoded("lossless", an_object(kv()))
    good = sealed(plain)
    data = forged(good, **{field: FORGERIES[field], **TOGETHER.get(field, {})})
    assert getattr(decode(data), field) != getattr(decode(good), field)
    into = memory(len(an_object(kv())))
    name = decode(data).object_id  # he also decides what it is found by
    with pytest.raises(CorruptObject, match="not what was encrypted"):
        restored_object(data, name, into, KeyRing([KEY]), Scratch(2))
    with pytest.raises(CorruptObject, match="not what was encrypted"):
        checked_object(data, name, KeyRing([KEY]), Scratch(2))


def test_bodies_cannot_be_exchanged() -> None:
    one, other = sealed(an_object(kv())), sealed(an_object(kv(), key=b"d" * 32))
    assert len(one) == len(other)
    one[HEADER_BYTES:] = other[HEADER_BYTES:]
    with pytest.raises(CorruptObject, match="not what was encrypted"):
        restored(forged(one), memory(len(an_object(kv()))))


def test_one_cannot_be_given_for_another() -> None:
    other = sealed(an_object(kv(), key=b"d" * 32))
    with pytest.raises(CorruptObject, match="holds object"):
        restored(other, memory(len(an_object(kv()))))


def test_what_is_not_encrypted_is_not_taken() -> None:
    whole = an_object(kv())
    for plain in (whole, encoded("lossless", whole), an_object(b"x", dtype="uint8", shape=(1,))):
        with pytest.raises(Incompatible, match="not encrypted, in a tier with encryption"):
            restored(plain, memory(len(whole)))
        with pytest.raises(Incompatible, match="not encrypted"):
            checked_object(plain, decode(plain).object_id, KeyRing([KEY]), Scratch(1))


def test_what_is_encrypted_is_not_taken_without_keys() -> None:
    data, into = sealed(an_object(kv())), memory(len(an_object(kv())))
    name = decode(data).object_id
    with pytest.raises(Incompatible, match=KeyRing([KEY]).ids[0].hex()):
        restored_object(data, name, into, None, Scratch(1))
    assert checked_object(data, name, None, Scratch(1)) == decode(data), "it is good, all the same"


def test_a_page_that_only_claims_to_be_encrypted() -> None:
    """Checksums are right, lengths are, and the key is ours: but nobody encrypted it."""
    raw = kv()
    plain = an_object(raw, encryption_key=KeyRing([KEY]).ids[0], raw_length=len(raw) - SEALED_BYTES)
    with pytest.raises(CorruptObject, match="not what was encrypted"):
        restored(plain, memory(stored_bytes(len(raw) - SEALED_BYTES)))


def test_a_slot_of_another_length_is_an_error_of_the_reader() -> None:
    for codec in ("raw", "lossless"):
        data = sealed(encoded(codec, an_object(kv())))
        with pytest.raises(UsageError, match="for a slot of"):
            restored(data, memory(len(an_object(kv())) + 4096))


def test_encoded_bytes_as_long_as_the_slot_are_not_taken_for_raw_ones() -> None:
    plain = an_object(kv(), codec="lossless", codec_parameters=b"\x01")
    with pytest.raises(CorruptObject, match="no smaller"):
        restored(sealed(plain), memory(len(plain)))
