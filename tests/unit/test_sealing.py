"""Objects encrypted and opened again: what the format page says, and the same bytes."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.sealed import (
    CODECS,
    KEY,
    OTHER,
    an_object,
    encoded,
    forged,
    kv,
    memory,
    opened,
    restored,
    sealed,
)

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import NOT_ENCRYPTED, SEALED_BYTES
from kvstrata.node.coding.recoding import (
    checked_object,
    restored_object,
    sealed_object,
)
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.coding.sealing import MAX_SEALED, KeyRing
from kvstrata.objects import HEADER_BYTES, checksum, decode, encode, stored_bytes


def test_it_is_what_the_format_page_says() -> None:
    """Opened by hand, with the page's offsets and names alone."""
    raw = kv()
    data = sealed(an_object(raw))
    page, length = bytearray(data[:4096]), len(raw) + 28
    assert struct.unpack_from("<Q", page, 152) == (length,)
    assert page[688:704] == blake3(KEY, derive_key_context="KVStrata 1 encryption key ids").digest(
        16
    )
    assert page[176:192] == checksum(data[4096 : 4096 + length])
    nonce = bytes(data[4096:4108])
    mask_key = blake3(KEY, derive_key_context="KVStrata 1 sealed checksums").digest()
    mask = blake3(nonce, key=mask_key).digest(32)
    assert bytes(a ^ b for a, b in zip(page[160:176], mask, strict=False)) == checksum(raw)
    page[16:32], page[176:192], page[192:200] = bytes(16), bytes(16), bytes(8)
    cipher = AESGCM(blake3(KEY, derive_key_context="KVStrata 1 sealed payloads").digest())
    assert cipher.decrypt(nonce, bytes(data[4108 : 4096 + length]), bytes(page)) == raw
    assert not any(data[4096 + length :])


def test_what_was_made_by_hand_is_opened() -> None:
    """The other way round: so no release can come to read only what it wrote itself."""
    raw, nonce = kv(), bytes(range(12))
    header = decode(an_object(raw))
    mask_key = blake3(KEY, derive_key_context="KVStrata 1 sealed checksums").digest()
    mask = blake3(nonce, key=mask_key).digest(32)
    key_id = blake3(KEY, derive_key_context="KVStrata 1 encryption key ids").digest(16)
    header = msgspec.structs.replace(
        header,
        raw_checksum=bytes(a ^ b for a, b in zip(checksum(raw), mask, strict=False)),
        encryption_key=key_id,
        stored_length=len(raw) + 28,
    )
    page = bytearray(encode(header))
    page[16:32], page[176:200] = bytes(16), bytes(24)
    cipher = AESGCM(blake3(KEY, derive_key_context="KVStrata 1 sealed payloads").digest())
    data = memory(stored_bytes(len(raw) + 28))
    data[4096 : 4096 + len(raw) + 28] = nonce + cipher.encrypt(nonce, raw, bytes(page))
    data[:4096] = encode(header)
    assert opened(forged(data)) == an_object(raw)


def test_positions_of_kept_tokens_are_hidden_too() -> None:
    raw, positions = kv(), checksum(b"positions")
    kept = {"kind": "kept", "group_kind": "recurrent", "boundary": 160}
    whole = an_object(raw, positions=positions, **kept)
    data = sealed(whole)
    mask_key = blake3(KEY, derive_key_context="KVStrata 1 sealed checksums").digest()
    mask = blake3(bytes(data[4096:4108]), key=mask_key).digest(32)[16:]
    assert decode(data).positions == bytes(a ^ b for a, b in zip(positions, mask, strict=True))
    assert opened(data) == whole


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from(CODECS),
    level=st.integers(0, 1),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 2**64 - 1),
    keys=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3, unique=True),
    later=st.lists(st.binary(min_size=32, max_size=32), max_size=2),
)
def test_any_object_comes_back(
    codec: str, level: int, seed: int, epoch: int, keys: list[bytes], later: list[bytes]
) -> None:
    whole = an_object(kv(seed))
    plain = encoded(codec, whole, level)
    data = forged(sealed(plain, *keys), epoch=epoch)  # as a tier stamps it
    back = opened(data, *later, keys[0])
    assert forged(back, epoch=7) == plain, "all of it, header and padding included"
    # And through all that a read does, into a slot that held something else.
    there, here = memory(len(whole)), memory(len(whole))
    there[:], here[:] = b"\xff" * len(whole), b"\xff" * len(whole)
    name = decode(plain).object_id
    want = restored_object(plain, name, there, None, Scratch(1))
    got = restored_object(data, name, here, KeyRing(keys), Scratch(2))
    assert msgspec.structs.replace(got, epoch=7) == want
    assert here[HEADER_BYTES:] == there[HEADER_BYTES:]
    assert decode(here) == got
    assert got.encryption_key == NOT_ENCRYPTED


@settings(deadline=None, max_examples=40)
@given(raw=st.binary(min_size=1, max_size=2 * HEADER_BYTES + 1))
@example(raw=bytes(HEADER_BYTES))
@example(raw=bytes(HEADER_BYTES - SEALED_BYTES))
@example(raw=bytes(HEADER_BYTES - SEALED_BYTES + 1))
def test_payloads_of_any_length(raw: bytes) -> None:
    whole = an_object(raw, dtype="uint8", shape=(len(raw),))
    data = sealed(whole)
    assert len(data) == 4096 + -(-(len(raw) + 28) // 4096) * 4096
    assert opened(data) == whole


def test_a_raw_object_is_opened_right_into_its_slot() -> None:
    class NoScratch(Scratch):
        def take(self, nbytes: int) -> mmap.mmap:
            raise AssertionError("a copy that nobody needs")

    whole = an_object(kv())
    into = memory(len(whole))
    restored_object(sealed(whole), decode(whole).object_id, into, KeyRing([KEY]), NoScratch(0))
    assert into == whole


def test_two_copies_have_nothing_in_common() -> None:
    """Of one object: another nonce, and with it another mask, ciphertext and tag."""
    whole = an_object(kv())
    one, other = decode(sealed(whole)), decode(sealed(whole))
    plain = decode(whole).raw_checksum
    assert len({one.raw_checksum, other.raw_checksum, plain}) == 3
    bodies = [np.frombuffer(sealed(whole), np.uint8)[HEADER_BYTES:] for _ in range(2)]
    same = np.flatnonzero(bodies[0][: len(kv())] == bodies[1][: len(kv())])
    assert len(same) < len(kv()) / 64
    assert len({bytes(sealed(whole)[4096:4108]) for _ in range(500)}) == 500


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_of_the_payload_is_to_be_seen(codec: str) -> None:
    plain = encoded(codec, an_object(kv()))
    header = decode(plain)
    payload = bytes(plain[HEADER_BYTES : HEADER_BYTES + header.stored_length])
    data = bytes(sealed(plain))
    assert not any(payload[i : i + 16] in data for i in range(0, len(payload) - 16, 16))
    assert header.raw_checksum not in data
    assert header.stored_checksum not in data
    assert KEY not in data


def test_keys_change_without_a_rewrite() -> None:
    whole = an_object(kv())
    old = sealed(whole, OTHER)
    assert opened(old, KEY, OTHER) == whole
    new = sealed(whole, KEY, OTHER)
    assert opened(new, KEY) == whole, "the first one encrypts"
    with pytest.raises(Incompatible, match="not known here"):
        opened(old, KEY)
    with pytest.raises(Incompatible, match="not known here"):
        restored(old, memory(len(whole)), b"s" * 32, KEY)


def test_a_key_says_nothing_of_itself() -> None:
    ring = KeyRing([KEY, OTHER, KEY])
    assert len(ring.ids) == 2
    assert all(len(one) == 16 for one in ring.ids)
    assert KEY.hex() not in repr(ring) + str(vars(ring)) + ring.ids[0].hex() * 2


@pytest.mark.parametrize("keys", [[], [b""], [bytes(16)], [KEY, bytes(33)]])
def test_keys_that_are_none(keys: list[bytes]) -> None:
    with pytest.raises(UsageError, match="keys of 32 bytes"):
        KeyRing(keys)


def test_what_was_damaged_before_it_was_encrypted_shows() -> None:
    """The writer's checksum comes along: a slot that is torn is no good for being encrypted."""
    whole = an_object(kv())
    whole[HEADER_BYTES + 100] ^= 1
    with pytest.raises(CorruptObject, match="the two payload checksums differ"):
        restored(sealed(whole), memory(len(whole)))


def test_too_large_for_the_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = an_object(kv())
    header = msgspec.structs.replace(decode(whole), stored_length=MAX_SEALED - SEALED_BYTES + 1)
    with pytest.raises(UsageError, match="too large to encrypt"):
        KeyRing([KEY]).seal(header, whole, memory(4096))
    data = sealed(whole)
    header = msgspec.structs.replace(decode(data), stored_length=MAX_SEALED + 1)
    with pytest.raises(CorruptObject, match="larger than anything is"):
        KeyRing([KEY]).open(header, data, memory(4096))
    monkeypatch.setattr("kvstrata.node.coding.sealing.MAX_SEALED", len(kv()) + SEALED_BYTES)
    assert opened(sealed(whole)) == whole, "the bound itself is allowed"


def _damaged(whole: memoryview) -> memoryview:
    whole[20] ^= 1
    return whole


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda s: sealed_object(KeyRing([KEY]), _damaged(an_object(kv())), s), CorruptObject),
        (lambda s: restored_object(
            sealed(encoded("int8", an_object(kv())), OTHER), decode(an_object(kv())).object_id,
            memory(len(an_object(kv()))), KeyRing([KEY]), s,
        ), Incompatible),
        (lambda s: checked_object(
            sealed(an_object(kv()), OTHER), decode(an_object(kv())).object_id, KeyRing([KEY]), s
        ), Incompatible),
    ],
)  # fmt: skip
def test_buffers_are_given_back(work: Callable[[Scratch], object], error: type[Exception]) -> None:
    scratch = Scratch(0)  # keeps none
    with pytest.raises(error):
        work(scratch)
    assert scratch.nbytes == 0


def test_a_seal_that_fails_gives_its_buffer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(0)
    monkeypatch.setattr("kvstrata.node.coding.sealing.MAX_SEALED", 1)
    with pytest.raises(UsageError):
        sealed_object(KeyRing([KEY]), an_object(kv()), scratch)
    assert scratch.nbytes == 0
