"""Kept tokens as tiers keep them: encoded head by head, and encrypted."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.support import sealed
from tests.support.selected import CHUNK, alike, an_object, drawn

from kvstrata.codecs import CODECS, codec_named
from kvstrata.codecs.base import Payload
from kvstrata.codecs.elements import to_float32
from kvstrata.codecs.kvtc import Kvtc
from kvstrata.codecs.quantized import INTEGERS, Quantized
from kvstrata.errors import CorruptObject
from kvstrata.header import ObjectHeader
from kvstrata.node.coding.recoding import Encoded, encoded_object, restored_object
from kvstrata.node.coding.scratch import Scratch
from kvstrata.objects import HEADER_BYTES, decode, encode, stored_bytes
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept

ROWS = 440
LOSSY = sorted(name for name, one in CODECS.items() if not one.lossless)


def put(codec: str, whole: memoryview) -> Encoded:
    made = encoded_object(codec_named(codec), whole, Scratch(1))
    assert made is not None
    return made


def back(data: memoryview, nbytes: int) -> tuple[ObjectHeader, memoryview]:
    into = memoryview(mmap.mmap(-1, nbytes))
    into[:] = b"\xa5" * nbytes
    header = restored_object(data, decode(data).object_id, into, None, Scratch(2))
    return header, into


def kept_of(header: ObjectHeader, whole: memoryview) -> Kept:
    payload = whole[HEADER_BYTES : HEADER_BYTES + header.raw_length]
    assert k.positions_digest(np.frombuffer(payload, np.uint8), header.shape) == header.positions
    return k.decode(payload, header.shape, header.dtype, header.boundary)


def test_lossless_gives_back_every_bit() -> None:
    whole = an_object(alike(), ROWS)
    made = put("lossless", whole)
    assert len(made.data) < 0.85 * len(whole)
    assert back(made.data, len(whole)) == (decode(whole), whole)


def test_without_room_for_more_rows_too() -> None:
    kept = alike(3, ((60,), (200,)))
    whole = an_object(kept)
    assert back(put("lossless", whole).data, len(whole))[1] == whole


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_codec_changes_elements_alone(codec: str) -> None:
    kept = alike(1)
    whole = an_object(kept, ROWS)
    made = put(codec, whole)
    assert len(made.data) < 0.7 * len(whole)
    header, there = back(made.data, len(whole))
    assert (header.codec, header.kind) == ("raw", "kept")
    again = kept_of(header, there)
    assert np.array_equal(again.counts, kept.counts)
    assert np.array_equal(again.positions, kept.positions)
    for ours, theirs in ((again.keys, kept.keys), (again.values, kept.values)):
        numbers, exact = to_float32(ours, kept.dtype), to_float32(theirs, kept.dtype)
        apart = np.linalg.norm(numbers - exact) / np.linalg.norm(exact)
        assert 0 < apart < 0.6


def test_its_bytes_are_those_of_the_page() -> None:
    """Counts and positions as they were, lengths of L x H frames, and the frames, by hand."""
    kept = alike(7, ((50, 0), (30, 90)))
    whole = an_object(kept, 200)
    made = put("int8", whole)
    stored = np.frombuffer(made.data, np.uint8, made.header.stored_length, HEADER_BYTES)
    table = 4 * (2 * 2 + 200)
    assert stored[:table].tobytes() == bytes(whole[HEADER_BYTES : HEADER_BYTES + table])
    lengths = stored[table : table + 16].view("<u4").reshape(2, 2)
    assert lengths[0, 1] == 0
    end = table + 16
    for layer, head in ((0, 0), (1, 0), (1, 1)):
        own = kept.head(layer, head)
        values = np.stack((kept.keys[own], kept.values[own]))[:, np.newaxis]
        alone = Payload((1, *values.shape), "bfloat16", int(kept.positions[own.start]))
        frame = np.zeros(INTEGERS[0].layer_bound(alone), np.uint8)
        size = INTEGERS[0].encode_layer(values, 0, alone, frame)
        assert lengths[layer, head] == size
        assert np.array_equal(stored[end : end + size], frame[:size])
        end += size
    assert end == len(stored)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
@pytest.mark.parametrize("what", ["bytes behind the frames", "a frame of no tokens"])
def test_frames_fill_what_is_stored(codec: str, what: str) -> None:
    kept = alike(7, ((50, 0), (30, 90)))
    whole = an_object(kept, 200)
    made = bytearray(put(codec, whole).data)
    length = decode(made).stored_length
    if what == "a frame of no tokens":  # that takes nothing away from the others
        made[HEADER_BYTES + 4 * (2 * 2 + 200) + 4] = 1
    made = made[: HEADER_BYTES + length].ljust(len(made) + HEADER_BYTES, b"\0")
    made[:HEADER_BYTES] = encode(replace(decode(made), stored_length=length + 1))
    made = made[: stored_bytes(length + 1)]
    forged = sealed.forged(memoryview(made))
    with pytest.raises(CorruptObject, match="do not fill"):
        back(forged, len(whole))


def test_each_head_has_ranges_of_its_own() -> None:
    """One whose numbers are a thousand times as large does not coarsen the others."""
    kept = alike(2, ((100, 100),))
    small, large = kept.head(0, 0), kept.head(0, 1)
    exact = to_float32(kept.keys, "bfloat16")
    words = (exact * 1024).astype(np.float32).view(np.uint32) >> 16
    kept.keys[large] = words.astype(np.uint16)[large]
    whole = an_object(kept)
    again = kept_of(*back(put("int8", whole).data, len(whole)))
    apart = to_float32(again.keys, "bfloat16")[small] - exact[small]
    assert np.linalg.norm(apart) < 0.02 * np.linalg.norm(exact[small])


def test_first_tokens_stay_exact_where_a_head_keeps_them() -> None:
    kept = alike(4, ((100, 100),))
    kept.positions[kept.head(0, 0)] = np.arange(100)
    kept.positions[kept.head(0, 1)] = np.arange(100) + 50
    whole = an_object(kept)
    again = kept_of(*back(put("int4", whole).data, len(whole)))
    same = (again.values == kept.values).all(axis=1)
    assert same[:4].all()
    assert not same[100:104].all()


def test_a_codec_that_takes_tokens_for_neighbours_leaves_it_as_it_is() -> None:
    class Neighbours(Quantized):
        positional = Kvtc.positional

    codec = Neighbours(8, 128, 64, 4, fit=False)
    assert encoded_object(INTEGERS[0], an_object(alike()), Scratch(1)) is not None
    assert encoded_object(codec, an_object(alike()), Scratch(1)) is None


@pytest.mark.parametrize("codec", ["lossless", "int8"])
@pytest.mark.parametrize(
    "changes",
    [
        {"positions": b"x" * 16},
        {"shape": (2, 2, 3, 430, 64)},
        {"shape": (2, 1, 3, 860, 64)},
        {"dtype": "uint8"},
        {"dtype": "float32"},
    ],
)
def test_what_is_no_kept_payload_stays_as_it_is(codec: str, changes: dict[str, Any]) -> None:
    whole = an_object(alike(), **changes)
    assert encoded_object(codec_named(codec), whole, Scratch(1)) is None


def test_positions_that_are_not_there_stay_as_they_are() -> None:
    kept = alike()
    kept.positions[0], kept.positions[1] = kept.positions[1], kept.positions[0]
    assert encoded_object(codec_named("lossless"), an_object(kept), Scratch(1)) is None


@settings(max_examples=150, deadline=None)
@given(data=st.data(), codec=st.sampled_from(["lossless", "int8", "cachegen-2", "fp8"]))
def test_hostile_bytes_are_refused_or_are_kept_tokens(data: st.DataObject, codec: str) -> None:
    """Whoever makes checksums may write anything; what comes of it is still a payload."""
    whole = an_object(alike(5, ((40, 0), (130, 60))), 240)
    made = bytearray(put(codec, whole).data)
    length = decode(made).stored_length
    for _ in range(data.draw(st.integers(1, 5))):
        limit = data.draw(st.sampled_from([32, 1000, length - 1]))
        made[HEADER_BYTES + data.draw(st.integers(0, limit))] = data.draw(st.integers(0, 255))
    forged = sealed.forged(memoryview(made))
    try:
        header, there = back(forged, len(whole))
    except CorruptObject:
        return
    kept_of(header, there)


def test_encrypted_with_its_positions_hidden() -> None:
    whole = an_object(alike(6), ROWS)
    coded = put("lossless", whole)
    closed = sealed.sealed(coded.data)
    assert decode(closed).positions != decode(whole).positions
    opened = sealed.opened(closed)
    assert opened == coded.data
    assert back(opened, len(whole))[1] == whole


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(
        st.lists(st.integers(0, CHUNK), min_size=2, max_size=2), min_size=1, max_size=3
    ).filter(lambda counts: sum(map(sum, counts)) > 40),
    spare=st.integers(0, 9),
    dtype=st.sampled_from(["bfloat16", "float32", "float8_e4m3fn"]),
)
def test_any_counts_come_back(counts: list[list[int]], spare: int, dtype: str) -> None:
    kept = drawn(0, counts, 64, dtype, CHUNK)
    kept.keys[:], kept.values[:] = 7, 9  # so that it becomes smaller
    whole = an_object(kept, kept.rows + spare)
    assert back(put("lossless", whole).data, len(whole))[1] == whole
