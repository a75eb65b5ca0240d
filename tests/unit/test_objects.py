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

from kvstrata import objects
from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import (
    CHECKSUM_BYTES,
    NO_PARENT,
    NOBODY,
    NOT_ENCRYPTED,
    SEALED_BYTES,
    ObjectHeader,
    object_id,
    split_object_id,
)
from kvstrata.objects import (
    HEADER_BYTES,
    checksum,
    decode,
    encode,
    page_like,
    stored_bytes,
    verify_object,
)

ROOT = Path(__file__).parents[2]


def golden(version: int) -> bytes:
    """A page as a file of it has it: without the zeros at its end."""
    text = (ROOT / f"tests/golden/object_header_{version}.hex").read_text()
    return bytes.fromhex(text).ljust(HEADER_BYTES, b"\0")


GOLDEN_1, GOLDEN = golden(1), golden(2)

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
    chunk_tokens=256,
    owner=bytes(range(128, 144)),
    group_kind="sliding",
    boundary=512,
    encryption_key=bytes(range(144, 160)),
    marks=bytes(range(160, 256)),
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
        "chunk_tokens": 128,
    }
    return ObjectHeader(**{**values, **changes})


def stored(header: ObjectHeader, payload: bytes = PAYLOAD) -> bytearray:
    return bytearray((encode(header) + payload).ljust(stored_bytes(len(payload)), b"\0"))


def sealed(page: bytearray) -> bytes:
    """The page with a header checksum that fits, so that what lies behind it is reached."""
    page[16:32] = bytes(16)
    page[16:32] = xxhash.xxh3_128(bytes(page)).digest()
    return bytes(page)


def test_golden() -> None:
    assert encode(NATIVE) == GOLDEN
    assert decode(GOLDEN) == NATIVE


def test_version_1_is_still_read() -> None:
    header = decode(GOLDEN_1)
    since_2 = {
        "chunk_tokens": 128,
        "owner": NOBODY,
        "group_kind": "full",
        "boundary": 0,
        "encryption_key": NOT_ENCRYPTED,
        "marks": b"",
    }
    assert header == msgspec.structs.replace(NATIVE, **since_2)
    assert decode(encode(header)) == header, "written again it is of version 2"


@pytest.mark.parametrize(
    ("at", "value"),
    [
        pytest.param(656, 1, id="an owner"),
        pytest.param(672, 128, id="tokens of a chunk"),
        pytest.param(676, 1, id="a kind of group"),
        pytest.param(4095, 1, id="a mark"),
        pytest.param(133, 0, id="a start without a parent"),
        pytest.param(10, 3, id="kept"),
    ],
)
def test_version_1_has_nothing_that_came_later(at: int, value: int) -> None:
    page = bytearray(GOLDEN_1)
    page[at] = value
    with pytest.raises(CorruptObject):
        decode(sealed(page))


def test_table_of_the_format_page_is_true() -> None:
    """Every row's offset, size and type, read against the golden page."""
    table = (ROOT / "docs/format.md").read_text().split("## Header page")[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| ([\w\[\]]+) \|", table, re.MULTILINE)
    expected = {
        **{name: getattr(NATIVE, name) for name in ObjectHeader.__struct_fields__},
        "magic": b"KVSTRATA",
        "version": 2,
        "kind": 1,
        "num_dims": 3,
        "group_kind": 2,
        "padding": bytes(3),
        "num_marks": 8,
        "marks": NATIVE.marks.ljust(3072, b"\0"),
        "codec_parameters_length": 4,
        "shape": (30, 1, 98304, 0, 0, 0, 0, 0),
        "codec_parameters": NATIVE.codec_parameters.ljust(256, b"\0"),
        "reserved": bytes(300),
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
    assert encode(header) == whole


@pytest.mark.parametrize("at", [299, 346, 399, 404, 655, 677, 724, 1023, 1120, 4095, 232])
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
        pytest.param(673, 0, id="more tokens than the chunk"),
        pytest.param(673, 17, id="a chunk of more than 4096 tokens"),
        pytest.param(681, 0, id="a window of nothing"),
        pytest.param(704, 1, id="positions of a payload that has none"),
        pytest.param(720, 7, id="a mark too few"),
        pytest.param(721, 1, id="marks beyond the page"),
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
    page[8] = 3
    with pytest.raises(Incompatible, match=r"version 3; this build reads 1 and 2"):
        decode(page)
    page = bytearray(GOLDEN)
    page[676] = 5
    with pytest.raises(Incompatible, match=r"group kind 5; this build knows 1 full, 2 sliding"):
        decode(sealed(page))
    page = bytearray(GOLDEN)
    page[10] = 9
    with pytest.raises(
        Incompatible, match=r"kind 9; this build knows 1 native, 2 portable, 3 kept"
    ):
        decode(sealed(page))


names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=32)
digests = st.binary(min_size=32, max_size=32)
sums = st.binary(min_size=CHECKSUM_BYTES, max_size=CHECKSUM_BYTES)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def headers(draw: st.DrawFn) -> ObjectHeader:
    start = draw(st.one_of(st.just(0), st.integers(0, 2**63)))
    kind = draw(st.sampled_from(["native", "portable", "kept"]))
    codec = draw(st.one_of(st.just("raw"), names))
    key = draw(st.one_of(st.just(NOT_ENCRYPTED), sums))
    sealed = SEALED_BYTES * (key != NOT_ENCRYPTED)
    raw_length, raw_checksum = draw(st.integers(1, 2**63)), draw(sums)
    raw = codec == "raw"
    chunk_tokens = draw(st.integers(1, 4096))
    num_tokens = draw(st.integers(1, chunk_tokens))
    group_kinds = ["recurrent"] + ["full", "sliding", "chunked"] * (kind != "kept")
    group_kind = draw(st.sampled_from(group_kinds))
    boundary = {"full": 0, "recurrent": start + num_tokens}
    num_marks = draw(st.sampled_from([0, num_tokens // 16]))
    dims = 5 if kind == "kept" else draw(st.integers(1, 8))
    return ObjectHeader(
        namespace=draw(digests),
        key=draw(digests),
        parent=draw(st.one_of(st.just(NO_PARENT), digests)) if start else NO_PARENT,
        start=start,
        num_tokens=num_tokens,
        group=draw(st.integers(0, 65535)),
        rank=draw(st.integers(0, 65535)),
        kind=kind,  # type: ignore[arg-type]
        order=draw(names) + "x" * 32 if kind == "native" else "",
        dtype=draw(names),
        shape=tuple(draw(st.lists(st.integers(1, 2**64 - 1), min_size=dims, max_size=dims))),
        codec=codec,
        codec_parameters=draw(st.binary(max_size=256)),
        epoch=draw(u64),
        created_ns=draw(u64),
        raw_length=raw_length,
        stored_length=raw_length + sealed if raw else draw(st.integers(1 + sealed, 2**64 - 1)),
        raw_checksum=raw_checksum,
        stored_checksum=raw_checksum if raw and not sealed else draw(sums),
        chunk_tokens=chunk_tokens,
        owner=draw(sums),
        group_kind=group_kind,  # type: ignore[arg-type]
        boundary=boundary.get(group_kind, draw(st.integers(1, 2**64 - 1))),
        encryption_key=key,
        positions=draw(sums) if kind == "kept" else bytes(CHECKSUM_BYTES),
        marks=draw(st.binary(min_size=12, max_size=12)) * num_marks,
    )


@given(headers())
def test_round_trip(header: ObjectHeader) -> None:
    page = encode(header)
    assert len(page) == HEADER_BYTES
    assert decode(page) == header
    assert decode(page) == header, "and again, now that one like it has been seen"


VARYING = [*range(64, 136), *range(152, 208), *range(1024, 4096)]
ZEROS = st.sampled_from([(64, 32), (96, 32), (128, 8), (152, 8), (160, 16), (176, 16), (1024, 12)])


@given(headers(), st.dictionaries(st.sampled_from(VARYING), st.integers(0, 255)), st.sets(ZEROS))
def test_a_page_like_one_before_is_judged_like_any_other(
    header: ObjectHeader, changes: dict[int, int], zeros: set[tuple[int, int]]
) -> None:
    page = bytearray(encode(header))
    decode(page)
    for at, nbytes in zeros:
        page[at : at + nbytes] = bytes(nbytes)
    for at, value in changes.items():
        page[at] = value
    whole = sealed(page)

    def judged() -> ObjectHeader | None:
        try:
            return decode(whole)
        except CorruptObject:
            return None

    remembered = judged()
    objects._alike.clear()
    assert remembered == judged()


OPEN = msgspec.structs.replace(NATIVE, encryption_key=NOT_ENCRYPTED)


@pytest.mark.parametrize(
    ("header", "at", "value"),
    [
        pytest.param(NATIVE, 128, bytes(8), id="the first chunk with a parent"),
        pytest.param(OPEN, 152, bytes(8), id="an empty payload"),
        pytest.param(NATIVE, 152, SEALED_BYTES.to_bytes(8, "little"), id="an empty sealed one"),
        pytest.param(portable(), 176, bytes(16), id="raw, with two checksums"),
        pytest.param(portable(), 152, b"\1", id="raw, with two lengths"),
        pytest.param(
            portable(group_kind="recurrent", boundary=1), 128, b"\1", id="a state of another place"
        ),
    ],
)
def test_a_page_like_one_before_may_be_wrong(header: ObjectHeader, at: int, value: bytes) -> None:
    page = bytearray(encode(header))
    assert decode(page) == header
    page[at : at + len(value)] = value
    with pytest.raises(CorruptObject):
        decode(sealed(page))


@given(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([bytes([1]) * 32, NO_PARENT]),
    st.integers(0, 1 << 40),
    st.binary(min_size=CHECKSUM_BYTES, max_size=CHECKSUM_BYTES),
    st.booleans(),
)
def test_a_page_made_like_another_is_what_its_header_encodes_to(
    key: bytes, parent: bytes, start: int, digest: bytes, marked: bool
) -> None:
    first = msgspec.structs.replace(
        NATIVE, codec="raw", codec_parameters=b"", stored_length=NATIVE.raw_length,
        stored_checksum=NATIVE.raw_checksum, encryption_key=NOT_ENCRYPTED, group_kind="full",
        boundary=0, marks=b"m" * 96 if marked else b"",
    )  # fmt: skip
    start = 0 if parent == NO_PARENT else start + 1
    marks = key + key + key if marked else b""
    header = msgspec.structs.replace(
        first, key=key, parent=parent, start=start, raw_checksum=digest, stored_checksum=digest,
        marks=marks,
    )  # fmt: skip
    assert page_like(encode(first), key, parent, start, digest, marks) == encode(header)


def test_what_is_remembered_is_bounded() -> None:
    for number in range(2 * objects.MAX_ALIKE):
        header = portable(namespace=number.to_bytes(32, "little"))
        assert decode(encode(header)) == header
    assert 0 < len(objects._alike) <= objects.MAX_ALIKE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": b"short"}, "key has 5 bytes"),
        ({"namespace": b""}, "namespace has 0 bytes"),
        ({"parent": b"p" * 32}, "start 0 does not go with parent"),
        ({"start": -1}, "start is -1"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": 2**32}, "num_tokens is"),
        ({"num_tokens": 129}, "129 tokens of a chunk of 128"),
        ({"chunk_tokens": 4097}, "a chunk has at most 4096"),
        ({"owner": b"me"}, "owner has 2 bytes"),
        ({"group_kind": "half"}, "group_kind 'half' is none of full"),
        ({"boundary": 1}, "a full group with the boundary 1"),
        ({"group_kind": "chunked"}, "a chunked group with the boundary 0"),
        ({"group_kind": "recurrent", "boundary": 2}, "a recurrent group with the boundary 2"),
        ({"num_tokens": 16, "marks": bytes(24)}, "marks of 24 bytes do not go with 16 tokens"),
        ({"positions": b"p" * 16}, "a portable payload with positions"),
        ({"kind": "kept", "shape": (1, 2)}, "a kept payload of shape (1, 2)"),
        ({"kind": "kept", "shape": (1, 2, 1, 2, 4)}, "a kept payload of a full group"),
        ({"encryption_key": b"k" * 16}, "raw, but 5124 bytes became 5124"),
        (
            {"encryption_key": b"k" * 16, "codec": "lossless", "stored_length": 28},
            "encrypted, in 28 bytes",
        ),
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
        encode(portable(**changes))


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
