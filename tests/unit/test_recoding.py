"""Objects encoded for a tier and back: the same bytes, or an error that says why."""

from __future__ import annotations

import mmap
import subprocess
import sys
from typing import cast

import msgspec
import numpy as np
import pytest
from tests.support.nodes import (
    ORDER,
    RAW,
    arrive,
    at_once,
    chunk_keys,
    flush,
    match,
    on_node,
    owned,
    payload,
    release,
    store,
    stored_payload,
    until,
)

from kvstrata.codecs import codec_named
from kvstrata.codecs.base import Payload
from kvstrata.codecs.lossless import Lossless
from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import GROUP_BITS, ObjectHeader
from kvstrata.layout import LayerGroup, native_order
from kvstrata.node.coding.recoding import Encoded, encoded_object, restored_object
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode, encode, stored_bytes
from kvstrata.testing.codecs import as_numbers, kv_like
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p

GROUP = LayerGroup(0, "full", 2, 3, 64, 2, "bfloat16")
PORTABLE = Payload((2, 2, 3, 128, 64), "bfloat16", 128)
VEC = "vllm/cpu-vec/b32/bfloat16"
NATIVE_SHAPE = (2, 4, 2, 3, 32, 64)


def native(order: str = VEC) -> bytes:
    """A chunk as vLLM keeps it on the CPU, or in another order."""
    words = kv_like(PORTABLE).view(np.uint16).reshape(PORTABLE.shape)
    return native_order(order).pack_layers(words, GROUP).tobytes()


def an_object(raw: bytes, **changes: object) -> memoryview:
    """A whole raw object in an aligned buffer."""
    fields = {
        "namespace": bytes(32),
        "key": b"k" * 32,
        "parent": b"p" * 32,
        "start": 128,
        "num_tokens": 128,
        "group": 0,
        "rank": 0,
        "kind": "native",
        "order": VEC,
        "dtype": "bfloat16",
        "shape": NATIVE_SHAPE,
        "codec": "raw",
        "codec_parameters": b"",
        "epoch": 0,
        "created_ns": 0,
        "raw_length": len(raw),
        "stored_length": len(raw),
        "raw_checksum": checksum(raw),
        "stored_checksum": checksum(raw),
        "chunk_tokens": 128,
    }
    header = ObjectHeader(**{**fields, **changes})  # type: ignore[arg-type]
    buffer = memoryview(mmap.mmap(-1, stored_bytes(len(raw))))
    buffer[:HEADER_BYTES] = encode(header)
    buffer[HEADER_BYTES : HEADER_BYTES + len(raw)] = raw
    return buffer


def slot(nbytes: int) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, nbytes))
    buffer[:] = b"\xa5" * nbytes
    return buffer


def test_a_native_object_comes_back_bit_for_bit() -> None:
    whole = an_object(native())
    encoded = cast(Encoded, encoded_object(Lossless(), whole, Scratch(1)))
    assert len(encoded.data) < 0.8 * len(whole)
    assert len(encoded.data) % 4096 == 0
    assert encoded.header.codec == "lossless"
    assert encoded.header.order == VEC
    back = slot(len(whole))
    header = restored_object(encoded.data, encoded.header.object_id, back, None, Scratch(1))
    assert back == whole
    assert header == decode(whole)


@pytest.mark.parametrize("shape", [(1, RAW // 2), (1, 1, 1, 1, RAW)])
def test_group_and_padding_come_back_too(shape: tuple[int, ...]) -> None:
    """Whatever the shape of a native payload says: it is words to a lossless codec."""
    whole = an_object(payload(b"a chunk"), shape=shape, group=5)
    scratch = Scratch(1)
    with scratch.buffer(len(whole)) as used_before:
        used_before[:] = b"\xa5" * len(whole)
    encoded = cast(Encoded, encoded_object(Lossless(), whole, scratch, level=2))
    assert encoded.header.group == 5 | 2 << GROUP_BITS
    end = HEADER_BYTES + encoded.header.stored_length
    assert encoded.data[end:] == bytes(len(encoded.data) - end)
    back = slot(len(whole))
    header = restored_object(encoded.data, encoded.header.object_id, back, None, Scratch(1))
    assert back == whole
    assert header == decode(whole)


def test_noise_stays_as_it_is() -> None:
    noise = np.random.default_rng(0).bytes(RAW)
    whole = an_object(noise, shape=(1, RAW // 2))
    assert encoded_object(Lossless(), whole, Scratch(1)) is None


def test_elements_nobody_knows_stay_as_they_are() -> None:
    whole = an_object(bytes(RAW), shape=(1, RAW), dtype="complex64")
    assert encoded_object(Lossless(), whole, Scratch(1)) is None


def test_a_size_that_is_no_whole_number_of_elements_stays_as_it_is() -> None:
    whole = an_object(bytes(RAW + 1), shape=(1, RAW + 1))
    assert encoded_object(Lossless(), whole, Scratch(1)) is None


@pytest.mark.parametrize(
    ("order", "shape"),
    [(VEC, NATIVE_SHAPE), ("sglang/strided-SNHD/b128/bfloat16", (2, 1, 2, 3, 128, 64))],
)
def test_a_lossy_codec_makes_a_native_object_portable(order: str, shape: tuple[int, ...]) -> None:
    whole = an_object(native(order), order=order, shape=shape)
    encoded = cast(Encoded, encoded_object(codec_named("cachegen-1"), whole, Scratch(1)))
    assert (encoded.header.kind, encoded.header.order) == ("portable", "")
    assert encoded.header.shape == PORTABLE.shape
    assert len(encoded.data) < 0.6 * len(whole)
    back = slot(len(whole))
    header = restored_object(encoded.data, encoded.header.object_id, back, None, Scratch(1))
    assert header.codec == "raw"
    assert header.raw_checksum == checksum(back[HEADER_BYTES : HEADER_BYTES + header.raw_length])
    raw = np.frombuffer(back, np.uint8, header.raw_length, HEADER_BYTES)
    here, there = as_numbers(PORTABLE, raw), as_numbers(PORTABLE, kv_like(PORTABLE))
    assert np.abs(here - there).mean() < 0.05 * np.abs(there).mean()


def test_a_lossy_codec_leaves_alone_what_it_cannot_read() -> None:
    for changes in ({"shape": (2, 4, 12288)}, {"order": "engine/strange/b32/bfloat16"}):
        whole = an_object(native(), **changes)
        assert encoded_object(codec_named("cachegen-1"), whole, Scratch(1)) is None


def test_a_lossy_codec_leaves_a_native_tail_alone() -> None:
    """What is empty behind its last token would count among the numbers."""
    whole = an_object(native(), num_tokens=100)
    assert encoded_object(codec_named("cachegen-1"), whole, Scratch(1)) is None
    encoded = cast(Encoded, encoded_object(Lossless(), whole, Scratch(1)))
    back = slot(len(whole))
    restored_object(encoded.data, encoded.header.object_id, back, None, Scratch(1))
    assert back == whole


def _changed(encoded: Encoded, **changes: object) -> memoryview:
    data = slot(len(encoded.data))
    data[:] = encoded.data
    data[:HEADER_BYTES] = encode(msgspec.structs.replace(encoded.header, **changes))
    return data


def test_what_is_refused() -> None:
    whole = an_object(native())
    encoded = cast(Encoded, encoded_object(Lossless(), whole, Scratch(1)))
    name, into = encoded.header.object_id, slot(len(whole))
    with pytest.raises(UsageError, match="for a slot of"):
        restored_object(encoded.data, name, slot(len(whole) + 4096), None, Scratch(1))
    with pytest.raises(Incompatible, match="unknown codec 'zip'"):
        restored_object(_changed(encoded, codec="zip"), name, into, None, Scratch(1))
    with pytest.raises(Incompatible, match="encrypted with the key 6b6b"):
        restored_object(_changed(encoded, encryption_key=b"k" * 16), name, into, None, Scratch(1))
    with pytest.raises(Incompatible, match="not version"):
        restored_object(_changed(encoded, codec_parameters=b"\xff"), name, into, None, Scratch(1))
    with pytest.raises(Incompatible, match="of complex64"):
        restored_object(_changed(encoded, dtype="complex64"), name, into, None, Scratch(1))
    with pytest.raises(CorruptObject, match="sizes of 1"):
        restored_object(_changed(encoded, shape=(1 << 60,)), name, into, None, Scratch(1))
    with pytest.raises(CorruptObject, match="other bytes than were stored"):
        restored_object(_changed(encoded, raw_checksum=bytes(16)), name, into, None, Scratch(1))
    flipped = _changed(encoded)
    flipped[HEADER_BYTES + 5] ^= 1
    with pytest.raises(CorruptObject):
        restored_object(flipped, name, into, None, Scratch(1))
    # A frame that is wrong though its checksum is right: made by hand.
    cut = slot(len(encoded.data))
    cut[:] = encoded.data
    cut[HEADER_BYTES] ^= 1
    end = HEADER_BYTES + encoded.header.stored_length
    digest = checksum(cut[HEADER_BYTES:end])
    cut[:HEADER_BYTES] = encode(msgspec.structs.replace(encoded.header, stored_checksum=digest))
    with pytest.raises(CorruptObject, match="frames end at"):
        restored_object(cut, name, into, None, Scratch(1))


def test_encoded_bytes_as_long_as_the_slot_are_not_decoded_in_place() -> None:
    raw = bytes(RAW - RAW % 2)
    whole = an_object(raw, codec="lossless", codec_parameters=b"\x01", shape=(1, RAW))
    with pytest.raises(CorruptObject, match="no smaller"):
        restored_object(whole, decode(whole).object_id, whole, None, Scratch(1))


def test_scratch_is_used_again() -> None:
    scratch = Scratch(1)
    small, large = scratch.take(4096), scratch.take(9000)
    assert len(large) == 12288
    scratch.give(small)
    scratch.give(large)
    assert scratch.take(5000) is large
    assert scratch.take(5000) is not large


def test_a_tier_keeps_more_with_a_codec_and_gives_back_the_same_bytes() -> None:
    keys, tier = chunk_keys(4), MemoryTier()

    async def test(node: Node) -> None:
        client = Client("pid 1")
        assert store(node, client, keys) == 4
        await flush(node, Client("pid 1"))
        backing = owned(node)
        assert backing.index.num_objects == 4
        assert backing.index.used_bytes < 4 * stored_bytes(RAW)
        for key in keys:
            node.host.drop(key, Cause.CLEARED)
        matched = match(node, client, keys)
        arrived = await arrive(node, client, matched.lease, 3)
        assert arrived.ready == 4
        for number, key in enumerate(keys):
            slot = node.host.get(key, 0)
            assert slot is not None
            assert stored_payload(node, slot.offset) == payload(key), number
        release(node, client, matched.lease)

    on_node(test, tier=tier, codec="lossless")


def test_objects_of_an_earlier_codec_stay_readable() -> None:
    keys, tier = chunk_keys(2), MemoryTier()

    async def write(node: Node) -> None:
        store(node, Client("pid 1"), keys)
        await flush(node, Client("pid 1"))

    async def read(node: Node) -> None:
        client = Client("pid 1")
        await until(lambda: owned(node).state == "ok")
        matched = match(node, client, keys)
        assert (await arrive(node, client, matched.lease, 1)).ready == 2
        release(node, client, matched.lease)

    for before, after in (("raw", "lossless"), ("lossless", "raw")):
        tier = KeptTier()
        on_node(write, tier=tier, codec=before)
        on_node(read, tier=tier, codec=after)


class KeptTier(MemoryTier):
    """Outlives the node that used it, as a folder does."""

    def close(self) -> None:
        pass


def test_a_reader_that_names_no_length_gets_only_what_is_stored_raw() -> None:
    keys = chunk_keys(2)

    async def test(node: Node) -> None:
        client = Client("pid 1")
        store(node, client, keys)
        await flush(node, Client("pid 1"))
        for key in keys:
            node.host.drop(key, Cause.CLEARED)
        matched = at_once(node.match(client, p.Match(1, b"".join(keys), [0], [ORDER])))
        arrived = await arrive(node, client, matched.lease, 0)
        assert (arrived.ready, arrived.failed) == (0, True)
        release(node, client, matched.lease)
        await until(lambda: not node.movement.arriving)
        # It is no fault of the object's: who knows its length still has it.
        matched = match(node, client, keys)
        assert (await arrive(node, client, matched.lease, 1)).ready == 2
        release(node, client, matched.lease)

    on_node(test, tier=MemoryTier(), codec="lossless")


def test_lengths_must_fit_the_parts() -> None:
    async def test(node: Node) -> None:
        for lengths in ([1, 2], [0], [1 << 48]):
            with pytest.raises(UsageError):
                node.match(Client("pid 1"), p.Match(1, bytes(32), [0], [ORDER], lengths))

    on_node(test)


@pytest.mark.bugs
def test_a_codec_that_fails_costs_nothing_but_space(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = chunk_keys(2)

    def broken(*_: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Lossless, "encode_layer", broken)

    async def test(node: Node) -> None:
        client = Client("pid 1")
        store(node, client, keys)
        await flush(node, Client("pid 1"))
        assert owned(node).index.used_bytes == 2 * stored_bytes(RAW)
        assert owned(node).writable

    on_node(test, tier=MemoryTier(), codec="lossless")


def test_an_engine_never_imports_numba_through_us() -> None:
    """vLLM on the CPU cannot start where numba was imported before its worker."""
    names = ("wire.client", "config", "wire.launch", "node.process.inprocess")
    modules = ", ".join(f"kvstrata.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
