"""A disk tier with encryption: what lies there says nothing, and what is ours comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.nodes import (
    ORDER,
    RAW,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    load,
    on_node,
    owned,
    payload,
    reserve,
    store,
    until,
    write,
)
from tests.support.sealed import (
    CORRUPT,
    KEY,
    MISSES,
    NUM,
    OTHER,
    WHOLE,
    Test,
    counted,
    files,
    get,
    put,
    tampered,
)

from kvstrata.codecs import codec_named
from kvstrata.codecs.lossless import Lossless
from kvstrata.node.coding.choosing import Always
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.common.changes import Cause
from kvstrata.node.node import Node
from kvstrata.node.service.origin import Origin
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode, stored_bytes
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.wire import protocol as p


def disk(folder: Path, test: Test, *keys: bytes, codec: str = "raw", slots: int = 40) -> None:
    """Run a test on a node with this disk tier, once its scan has ended."""

    async def scanned(node: Node) -> None:
        await until(lambda: owned(node).state == "ok")
        await test(node)

    ring = KeyRing(keys) if keys else None
    on_node(scanned, tier=DiskTier(folder), slots=20, tier_slots=slots, codec=codec, keys=ring)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def stored(folder: Path) -> list[bytes]:
    """Keys of chunks that an earlier node left, encrypted."""
    keys = chunk_keys(NUM)

    async def fill(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))

    disk(folder, fill, KEY)
    return keys


async def no_buffer_is_lost(node: Node) -> None:
    """They go once nobody needs them."""
    for _ in range(2):
        await owned(node).upkeep()
    assert owned(node).scratch_bytes == 0


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_nothing_readable_lies_on_disk_and_all_of_it_comes_back(folder: Path, codec: str) -> None:
    keys = chunk_keys(NUM)

    async def fill(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))
        assert owned(node).index.num_objects == NUM
        assert await get(node, keys) == NUM
        await no_buffer_is_lost(node)

    async def read(node: Node) -> None:
        assert await get(node, keys) == NUM
        assert counted(node, MISSES) == counted(node, CORRUPT) == 0
        await no_buffer_is_lost(node)

    disk(folder, fill, KEY, codec=codec)
    assert len(files(folder)) == NUM
    for file in files(folder):
        header = decode(file.read_bytes())
        assert header.encryption_key == KeyRing([KEY]).ids[0]
        assert header.codec == codec
        if codec == "raw":
            assert file.stat().st_size == stored_bytes(WHOLE) + HEADER_BYTES
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for key in keys:
        data = payload(key, nbytes=WHOLE)
        assert not any(data[i : i + 16] in everything for i in range(0, WHOLE, 512))
        assert checksum(data) not in everything
    disk(folder, read, KEY, codec=codec)


def test_an_object_of_which_a_page_is_left_fits_its_slot(folder: Path) -> None:
    """With padding enough for nonce and tag, an encrypted object is as long as its slot."""
    keys = chunk_keys(NUM)

    async def test(node: Node) -> None:
        client = Client("pid 1")
        store(node, client, keys)
        await flush(node, client)
        for key in keys:
            node.host.drop(key, Cause.CLEARED)
        assert await load(node, client, keys) == NUM
        assert owned(node).find(keys[0], 0, None) == stored_bytes(RAW)

    disk(folder, test, KEY)


def test_capacity_counts_what_is_stored(folder: Path) -> None:
    """Six objects of six pages are more than 30 pages; `on_node` checks every byte."""
    keys = chunk_keys(6)

    async def test(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))
        index = owned(node).index
        assert index.capacity_bytes == 30 * 4096
        assert index.used_bytes == sum(file.stat().st_size for file in files(folder))
        assert index.num_objects == 5, "of five pages each, as they are raw, all six would fit"

    disk(folder, test, KEY, slots=10)


def test_keys_change_at_a_restart(folder: Path, stored: list[bytes]) -> None:
    more = chunk_keys(NUM, prompt=1)

    async def rotate(node: Node) -> None:
        assert await get(node, stored) == NUM
        put(node, more)
        await flush(node, Client("pid 1"))

    async def later(node: Node) -> None:
        assert await get(node, more) == NUM
        assert await get(node, stored) == 0

    disk(folder, rotate, OTHER, KEY)
    disk(folder, later, OTHER)


@pytest.mark.parametrize("keys", [(OTHER,), ()], ids=["another key", "no key"])
def test_what_cannot_be_opened_is_a_counted_miss_and_stays(
    folder: Path, stored: list[bytes], keys: tuple[bytes, ...]
) -> None:
    before = files(folder)

    async def test(node: Node) -> None:
        assert await get(node, stored) == 0
        assert counted(node, MISSES) >= 1
        assert counted(node, CORRUPT) == 0
        assert files(folder) == before

    async def again(node: Node) -> None:
        assert await get(node, stored) == NUM

    disk(folder, test, *keys)
    disk(folder, again, KEY)


def test_a_fresh_copy_takes_the_place_of_what_cannot_be_opened(
    folder: Path, stored: list[bytes]
) -> None:
    async def test(node: Node) -> None:
        assert await get(node, stored[:1]) == 0
        put(node, stored[:1])
        await flush(node, Client("pid 1"))
        assert await get(node, stored[:1]) == 1

    disk(folder, test, OTHER)
    assert len(files(folder)) == NUM


def test_what_is_not_encrypted_is_a_counted_miss_in_a_tier_with_keys(folder: Path) -> None:
    keys = chunk_keys(NUM)

    async def fill(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))

    async def test(node: Node) -> None:
        assert await get(node, keys) == 0
        assert counted(node, MISSES) >= 1
        await owned(node).verify(keys[1], 0, stored_bytes(WHOLE))
        assert owned(node).find(keys[1], 0, None) is None, "the scrub sees it too"
        assert len(files(folder)) == NUM

    disk(folder, fill)
    disk(folder, test, KEY)


@pytest.mark.parametrize("found_by", ["a read", "the scrub"])
def test_what_was_tampered_with_is_rejected(
    folder: Path, stored: list[bytes], found_by: str
) -> None:
    for file in files(folder):
        file.write_bytes(tampered(file.read_bytes()))

    async def test(node: Node) -> None:
        if found_by == "a read":
            assert await get(node, stored[:1]) == 0
        else:
            await owned(node).verify(stored[0], 0, stored_bytes(WHOLE + 28))
        assert counted(node, CORRUPT) == 1
        await until(lambda: owned(node).index.num_objects == NUM - 1)
        await until(lambda: len(list((folder / "quarantine").iterdir())) == 1)
        put(node, stored[:1])
        await flush(node, Client("pid 1"))
        assert await get(node, stored[:1]) == 1

    disk(folder, test, KEY)


def test_what_an_earlier_time_stored_can_be_given_again(folder: Path, stored: list[bytes]) -> None:
    """The limit of it, which docs/encryption.md states: an old copy is a good one."""
    old = {file.name.split("-")[0]: file.read_bytes() for file in files(folder)}

    async def overwrite(node: Node) -> None:
        assert await clear(node, Client("pid 1")) == NUM
        put(node, stored)
        await flush(node, Client("pid 1"))

    async def test(node: Node) -> None:
        assert await get(node, stored) == NUM

    disk(folder, overwrite, KEY)
    for file in files(folder):
        file.write_bytes(old[file.name.split("-")[0]])
    disk(folder, test, KEY)


@pytest.mark.bugs
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_what_cannot_be_encrypted_is_not_stored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    keys = chunk_keys(2)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(KeyRing, "seal", broken)

    async def test(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))
        assert files(folder) == []
        assert owned(node).index.used_bytes == 0
        assert counted(node, 'bugs_total{where="encryption"}%s', "") == 2
        assert owned(node).writable
        await no_buffer_is_lost(node)

    disk(folder, test, KEY, codec=codec)


def test_what_is_too_large_is_not_stored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstrata.node.coding.sealing.MAX_SEALED", WHOLE)

    async def test(node: Node) -> None:
        put(node, chunk_keys(1))
        await flush(node, Client("pid 1"))
        assert files(folder) == []

    disk(folder, test, KEY)
    assert "an object is not stored: a payload of 16384 bytes is too large" in caplog.text


@pytest.mark.bugs
def test_a_codec_that_fails_leaves_it_raw_and_encrypted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chunk_keys(2)

    def broken(*_: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Lossless, "encode_layer", broken)

    async def test(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))
        assert await get(node, keys) == 2

    disk(folder, test, KEY, codec="lossless")
    assert [decode(file.read_bytes()).codec for file in files(folder)] == ["raw", "raw"]
    assert all(decode(file.read_bytes()).encryption_key != bytes(16) for file in files(folder))


def test_a_slot_that_was_damaged_is_not_served_from_below(folder: Path) -> None:
    keys = chunk_keys(1)

    async def test(node: Node) -> None:
        client = Client("pid 1")
        number, offsets = reserve(node, client, keys, nbytes=WHOLE)
        sums = write(node, keys, offsets, nbytes=WHOLE)
        node.host.pool.view(offsets[0] + HEADER_BYTES, 1)[0] ^= 1
        node.commit(client, p.Commit(1, number, b"".join(sums)))
        await flush(node, client)
        assert await get(node, keys) == 0
        assert counted(node, CORRUPT) == 1

    disk(folder, test, KEY)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_the_buffers_of_a_write_that_is_cancelled_are_nobodys(codec: str) -> None:
    """A thread may still read them."""
    keys, tier = chunk_keys(1), GatedTier()

    async def test(node: Node) -> None:
        put(node, keys)
        await flush(node, Client("pid 1"))
        await clear(node, Client("pid 1"), tiers=["memory"])
        slot, backing = node.host.get(keys[0], 0), owned(node)
        assert slot is not None
        await no_buffer_is_lost(node)
        tier.shut("write")
        view = node.host.pool.view(slot.offset, slot.nbytes)
        write = asyncio.ensure_future(backing.write(keys[0], view, Origin(keys, 0, ORDER)))
        await until(lambda: tier.waiting > 0)
        write.cancel()
        await asyncio.wait({write})
        taken = backing._scratch.nbytes
        for _ in range(2):
            await backing.upkeep()
        assert backing._scratch.nbytes == taken > 0, "none was given back"
        tier.open()
        await until(lambda: tier.held > 0)
        tier.clear()

    on_node(test, tier=tier, slots=20, codec=codec, keys=KeyRing([KEY]))


@pytest.mark.parametrize("keys", [(KEY,), ()], ids=["encrypted", "plain"])
def test_a_coarser_copy_that_cannot_be_made_is_none(folder: Path, keys: tuple[bytes, ...]) -> None:
    """Of this byte order no lossy codec knows anything."""

    async def test(node: Node) -> None:
        owned(node).coarser = (Always(codec_named("int8")),)
        put(node, chunk_keys(2))
        await flush(node, Client("pid 1"))
        assert len(files(folder)) == 2

    disk(folder, test, *keys)
