"""The header page is pinned by golden bytes, and every damaged one is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.objects import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    NO_PARENT,
    ObjectHeader,
    checksum,
    decode,
    object_id,
    split_object_id,
    stored_bytes,
    verify_object,
)

ROOT = Path(__file__).parents[2]
GOLDEN = bytes.fromhex((ROOT / "tests/golden/object_header_1.hex").read_text()).ljust(
    HEADER_BYTES, b"\0"
)

NATIVE = ObjectHeader(
    namespace=bytes(range(32)),
    key=bytes(range(32, 64)),
    parent=bytes(range(64, 96)),
    start=1 << 40,
    num_tokens=128,
    group=3,
    rank=258,
    kind="native",
    order="vllm/cpu-amx/b128/bfloat16",
    dtype="bfloat16",
    shape=(30, 1, 98304),
    codec="lossless",
    codec_parameters=b"\x01\x00\x02\x00",
    epoch=7,
    created_ns=1_750_000_000_123_456_789,
    raw_length=2_949_120,
    stored_length=1_992_649,
    raw_checksum=bytes(range(96, 112)),
    stored_checksum=bytes(range(112, 128)),
)
PAYLOAD = bytes(range(256)) * 20 + b"tail"


def portable(payload: bytes = PAYLOAD, **changes: Any) -> ObjectHeader:
    """A valid portable header of the first chunk, with the lengths and checksums of a payload."""
    values: dict[str, Any] = {
        "namespace": b"n" * 32,
        "key": b"k" * 32,
        "parent": NO_PARENT,
        "start": 0,
        "num_tokens": 1,
        "group": 0,
        "rank": 0,
        "kind": "portable",
        "order": "",
        "dtype": "float16",
        "shape": (1, 2, 1, 1, 1281),
        "codec": "raw",
        "codec_parameters": b"",
        "epoch": 0,
        "created_ns": 0,
        "raw_length": len(payload),
        "stored_length": len(payload),
        "raw_checksum": checksum(payload),
        "stored_checksum": checksum(payload),
    }
    return ObjectHeader(**{**values, **changes})


def stored(header: ObjectHeader, payload: bytes = PAYLOAD) -> bytearray:
    return bytearray((header.encode() + payload).ljust(stored_bytes(len(payload)), b"\0"))


def sealed(page: bytearray) -> bytes:
    """The page with a header checksum that fits, so that what lies behind it is reached."""
    page[16:32] = bytes(16)
    page[16:32] = xxhash.xxh3_128(bytes(page)).digest()
    return bytes(page)


def test_golden() -> None:
    assert NATIVE.encode() == GOLDEN
    assert decode(GOLDEN) == NATIVE


def test_table_of_the_format_page_is_true() -> None:
    """Every row's offset, size and type, read against the golden page."""
    table = (ROOT / "docs/format.md").read_text().split("## Header page")[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| ([\w\[\]]+) \|", table, re.MULTILINE)
    expected = {
        **{name: getattr(NATIVE, name) for name in ObjectHeader.__struct_fields__},
        "magic": b"KVSTRATA",
        "version": 1,
        "kind": 1,
        "num_dims": 3,
        "codec_parameters_length": 4,
        "shape": (30, 1, 98304, 0, 0, 0, 0, 0),
        "codec_parameters": NATIVE.codec_parameters.ljust(256, b"\0"),
        "reserved": bytes(3440),
        "header_checksum": xxhash.xxh3_128(GOLDEN[:16] + bytes(16) + GOLDEN[32:]).digest(),
    }
    end = 0
    for offset, size, name, kind in rows:
        assert int(offset) == end, name
        end += int(size)
        field = GOLDEN[int(offset) : end]
        value = read_field(kind, field)
        assert value == expected.pop(name), name
    assert end == HEADER_BYTES
    assert not expected, "fields without a row"


def read_field(kind: str, field: bytes) -> Any:
    """A field as the table types it."""
    if kind == "int":
        return int.from_bytes(field, "little")
    if kind == "int[8]":
        return tuple(int.from_bytes(field[at : at + 8], "little") for at in range(0, 64, 8))
    return field.rstrip(b"\0").decode("ascii") if kind == "text" else field


def test_every_flipped_bit_is_refused() -> None:
    page = bytearray(GOLDEN)
    for bit in range(HEADER_BYTES * 8):
        page[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptObject, Incompatible)):
            decode(page)
        page[bit // 8] ^= 1 << bit % 8
    assert decode(page) == NATIVE


@given(st.binary(max_size=HEADER_BYTES + 8))
def test_any_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(CorruptObject):
        decode(noise)


@given(st.dictionaries(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255), max_size=6))
def test_a_sealed_page_decodes_to_what_encodes_to_it_or_is_refused(changes: dict[int, int]) -> None:
    """Damage that the checksum cannot see: a writer with a fault of its own."""
    page = bytearray(GOLDEN)
    for at, value in changes.items():
        page[at] = value
    whole = sealed(page)
    try:
        header = decode(whole)
    except (CorruptObject, Incompatible):
        return
    assert header.encode() == whole


@pytest.mark.parametrize("at", [299, 346, 399, 404, 655, 656, 4095, 232])
def test_padding_must_be_zero(at: int) -> None:
    page = bytearray(GOLDEN)
    assert page[at] == 0
    page[at] = 1
    with pytest.raises(CorruptObject):
        decode(sealed(page))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(11, 0, id="no dimensions"),
        pytest.param(11, 9, id="too many dimensions"),
        pytest.param(136, 0, id="no tokens"),
        pytest.param(141, 2, id="parameters longer than their field"),
        pytest.param(272, 0xC3, id="order not ASCII"),
        pytest.param(273, 0, id="order with a hole"),
        pytest.param(273, 0x20, id="order with a space"),
        pytest.param(336, 0, id="dtype begins with zero"),
    ],
)
def test_sealed_nonsense(at: int, value: int) -> None:
    page = bytearray(GOLDEN)
    page[at] = value
    with pytest.raises(CorruptObject):
        decode(sealed(page))


def test_short_pages() -> None:
    for size in (0, 1, 9, 10, 655, 656, 4095):
        with pytest.raises(CorruptObject, match=f"of {size} bytes"):
            decode(GOLDEN[:size])


def test_unknown_version_and_kind_are_named() -> None:
    page = bytearray(GOLDEN)
    page[8] = 2
    with pytest.raises(Incompatible, match=r"version 2; this build reads version 1"):
        decode(page)
    page = bytearray(GOLDEN)
    page[10] = 9
    with pytest.raises(Incompatible, match=r"kind 9; this build knows 1 native, 2 portable"):
        decode(sealed(page))


names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=32)
digests = st.binary(min_size=32, max_size=32)
sums = st.binary(min_size=CHECKSUM_BYTES, max_size=CHECKSUM_BYTES)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def headers(draw: st.DrawFn) -> ObjectHeader:
    start = draw(st.one_of(st.just(0), u64))
    native = draw(st.booleans())
    codec = draw(st.one_of(st.just("raw"), names))
    raw_length, raw_checksum = draw(st.integers(1, 2**64 - 1)), draw(sums)
    raw = codec == "raw"
    return ObjectHeader(
        namespace=draw(digests),
        key=draw(digests),
        parent=draw(digests.filter(lambda key: key != NO_PARENT)) if start else NO_PARENT,
        start=start,
        num_tokens=draw(st.integers(1, 2**32 - 1)),
        group=draw(st.integers(0, 65535)),
        rank=draw(st.integers(0, 65535)),
        kind="native" if native else "portable",
        order=draw(names) + "x" * 32 if native else "",
        dtype=draw(names),
        shape=tuple(draw(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=8))),
        codec=codec,
        codec_parameters=draw(st.binary(max_size=256)),
        epoch=draw(u64),
        created_ns=draw(u64),
        raw_length=raw_length,
        stored_length=raw_length if raw else draw(st.integers(1, 2**64 - 1)),
        raw_checksum=raw_checksum,
        stored_checksum=raw_checksum if raw else draw(sums),
    )


@given(headers())
def test_round_trip(header: ObjectHeader) -> None:
    page = header.encode()
    assert len(page) == HEADER_BYTES
    assert decode(page) == header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": b"short"}, "key has 5 bytes"),
        ({"namespace": b""}, "namespace has 0 bytes"),
        ({"parent": b"p" * 32}, "start 0 does not go with parent"),
        ({"start": 128}, "start 128 does not go with parent"),
        ({"start": -1}, "start is -1"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": 2**32}, "num_tokens is"),
        ({"group": 65536}, "group is 65536"),
        ({"rank": -1}, "rank is -1"),
        ({"epoch": 2**64}, "epoch is"),
        ({"raw_length": 0, "stored_length": 0}, "raw_length is 0"),
        ({"stored_length": 1}, "raw, but 5124 bytes became 1"),
        ({"stored_checksum": bytes(16)}, "payload checksums differ"),
        ({"raw_checksum": b""}, "raw_checksum has 0 bytes"),
        ({"kind": "other"}, "kind 'other'"),
        ({"kind": "native"}, "native payload with the order ''"),
        ({"order": "vllm"}, "portable payload with the order 'vllm'"),
        ({"order": "x" * 65}, "order has 65"),
        ({"dtype": ""}, "dtype has 0"),
        ({"dtype": "float16\0"}, "not printable"),
        ({"codec": "röh"}, "not printable ASCII"),
        ({"shape": ()}, "shape has 0"),
        ({"shape": (1,) * 9}, "shape has 9"),
        ({"shape": (1, 0)}, "not 1 to"),
        ({"codec_parameters": bytes(257)}, "257 bytes"),
    ],
)
def test_what_the_format_does_not_allow_is_not_encoded(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        portable(**changes).encode()


def test_object_id_golden() -> None:
    name = object_id(b"k" * 32, 1, 258)
    assert name == b"k" * 32 + b"\x01\x00\x02\x01"
    assert split_object_id(name) == (b"k" * 32, 1, 258)
    assert portable(group=1, rank=258).object_id == name


@pytest.mark.parametrize(
    ("key", "group", "rank"), [(b"k" * 31, 0, 0), (b"k" * 32, 65536, 0), (b"k" * 32, 0, -1)]
)
def test_object_id_refuses(key: bytes, group: int, rank: int) -> None:
    with pytest.raises(UsageError):
        object_id(key, group, rank)


@pytest.mark.parametrize("size", [0, 35, 37])
def test_split_object_id_refuses(size: int) -> None:
    with pytest.raises(UsageError, match=f"of {size} bytes"):
        split_object_id(bytes(size))


def test_stored_bytes() -> None:
    sizes = [stored_bytes(length) for length in (1, 4095, 4096, 4097, 2_949_120)]
    assert sizes == [8192, 8192, 8192, 12288, 4096 + 2_949_120]


def test_checksum_golden() -> None:
    # The reference value of XXH3-128 of nothing, seed 0, in its canonical form.
    assert checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert checksum(memoryview(b"abc")) == checksum(bytearray(b"abc"))


def test_verify_accepts_what_was_stored() -> None:
    header = portable()
    assert verify_object(stored(header), header.object_id) == header


def test_verify_names_the_check_that_failed() -> None:
    header = portable()
    other = object_id(b"k" * 32, 0, 1)
    with pytest.raises(CorruptObject, match=f"holds object .*, not {other.hex()}"):
        verify_object(stored(header), other)
    whole = stored(header)
    with pytest.raises(CorruptObject, match=f"of 8192 bytes; its header says {len(whole)}"):
        verify_object(whole[:8192], header.object_id)
    with pytest.raises(CorruptObject, match="header says"):
        verify_object(whole + bytes(4096), header.object_id)
    whole[-1] = 1
    with pytest.raises(CorruptObject, match="padding"):
        verify_object(whole, header.object_id)
    whole = stored(header)
    whole[HEADER_BYTES + 17] ^= 4
    with pytest.raises(CorruptObject, match="payload checksum"):
        verify_object(memoryview(whole), header.object_id)
    with pytest.raises(CorruptObject, match="header page of 0 bytes"):
        verify_object(b"", header.object_id)


@given(st.integers(0, stored_bytes(len(PAYLOAD)) * 8 - 1))
def test_any_flipped_bit_of_an_object_is_refused(bit: int) -> None:
    header = portable()
    whole = stored(header)
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CorruptObject, Incompatible)):
        verify_object(whole, header.object_id)


def test_verify_checks_the_stored_bytes_of_an_encoded_payload() -> None:
    encoded = b"shorter"
    header = portable(
        codec="lossless", stored_length=len(encoded), stored_checksum=checksum(encoded)
    )
    whole = stored(header, encoded)
    assert verify_object(whole, header.object_id) == header
    wrong = msgspec.structs.replace(header, stored_checksum=header.raw_checksum)
    with pytest.raises(CorruptObject, match="payload checksum"):
        verify_object(stored(wrong, encoded), header.object_id)
