"""A node with real slower tiers and codecs: what lies where, and what is stored again."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from tests.support.nodes import clear, flush, until
from tests.support.real_nodes import KEYS, ME, NBYTES, chunk, load, on_real_node, store, used

from kvstrata.node.coding import recoding
from kvstrata.node.node import Node
from kvstrata.objects import HEADER_BYTES, decode, stored_bytes, verify_object
from kvstrata.parts import identity


def test_encoded_objects_in_host_memory() -> None:
    async def test(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        assert 0 < used(node)["memory"] < 0.75 * 3 * stored_bytes(NBYTES)
        await clear(node, ME, tiers=["host"])
        tiers, payloads = await load(node)
        assert tiers == [1, 1, 1]
        assert payloads == [chunk(number) for number in range(3)]

    on_real_node(test, {"memory.capacity": "8MiB"})


def test_memory_before_disk(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        both = used(node)
        assert both["memory"] == both["disk"] > 0, "the same codec, the same bytes"
        await clear(node, ME, tiers=["host", "memory"])
        assert used(node)["memory"] == 0
        tiers, payloads = await load(node, 2)
        assert tiers == [2, 2]
        assert payloads == [chunk(0), chunk(1)]
        await flush(node, ME)
        assert used(node)["memory"] == both["memory"] // 3 * 2, "what was read is kept nearer"
        await clear(node, ME, tiers=["host"])
        tiers, payloads = await load(node)
        assert tiers == [1, 1, 2]
        assert payloads == [chunk(number) for number in range(3)]

    on_real_node(
        test,
        {
            "memory.capacity": "8MiB",
            "disk.path": tmp_path / "disk",
            "disk.capacity": "8MiB",
            "disk.codec": "lossless",
        },
    )


def test_what_decodes_a_disk_is_compiled_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    async def fill(node: Node) -> None:
        store(node)
        await flush(node, ME)

    async def look(node: Node) -> None:
        await until(lambda: bool(compiled))
        assert compiled == ["lossless"]
        assert not node.counters.get("tier_read_bytes_total", tier="disk")

    disk = {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB", "disk.scrub_rate": "0"}
    on_real_node(fill, {**disk, "disk.codec": "lossless"})
    monkeypatch.setattr(recoding, "warm_up", lambda codec: compiled.append(codec.name))
    on_real_node(look, {**disk, "disk.codec": "raw"})
    recoding.get_ready_to_decode("a codec of a later release", b"")
    assert compiled == ["lossless"]


def test_headers_carry_the_epoch_of_the_tier_they_lie_in(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await clear(node, ME, tiers=["memory"])
        await clear(node, ME, tiers=["disk"])
        await clear(node, ME, tiers=["disk"])
        store(node)
        await flush(node, ME)
        slot = node.host.get(KEYS[0], 0)
        assert slot is not None
        whole = memoryview(mmap.mmap(-1, slot.nbytes))
        epochs = [decode(node.host.pool.view(slot.offset, HEADER_BYTES)).epoch]
        for backing in node.backings:
            name = identity(KEYS[0], 0)
            (nbytes,) = backing.tier.read([name], [whole])
            assert isinstance(nbytes, int)
            epochs.append(verify_object(whole[:nbytes], name).epoch)
        assert epochs == [0, 1, 2]

    disk = {"disk.path": tmp_path / "disk", "disk.capacity": "8MiB", "disk.codec": "raw"}
    on_real_node(test, {"memory.capacity": "8MiB", **disk})


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_lossy_codec_gave_back_is_never_encoded_again(tmp_path: Path, restart: bool) -> None:
    """KV that an engine loaded from such a tier is less than exact; storing it loses once more."""
    options = {
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.codec": "cachegen-2",
        "memory.capacity": "8MiB",
        "memory.codec": "cachegen-4",
    }

    async def first(node: Node) -> None:
        assert store(node) == 3
        await flush(node, ME)
        if not restart:
            await second(node)

    async def second(node: Node) -> None:
        await until(lambda: node.backings[1].state == "ok")
        await clear(node, ME, tiers=["host", "memory"])
        before = used(node)
        assert store(node) == 0, "the engine's copy may have come from here"
        tiers, payloads = await load(node)
        assert tiers == [2, 2, 2]
        assert payloads[0] != chunk(0)
        assert store(node) == 0
        await flush(node, ME)
        assert used(node) == before

    on_real_node(first, options)
    if restart:
        on_real_node(second, options)
