"""Tables and queues against the dictionaries of the library, and that no change in them is long."""

from __future__ import annotations

import gc
import random
import types
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from tests.support.nodes import chunk_keys, flush, match, on_node, release, store

from kvstrata.node.node import Node
from kvstrata.node.operating.directory import BUCKET_BITS
from kvstrata.node.slots.clients import Client
from kvstrata.policies import POLICIES
from kvstrata.tables import NUM_PIECES, Offsets, Queue, Table
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.memory import MemoryTier

DICE = random.Random(1)
KEYS = [DICE.randbytes(DICE.randrange(1, 4)) for _ in range(60)]


def same(queue: Queue[int], model: OrderedDict[bytes, int]) -> None:
    queue.check_integrity()
    assert list(queue.items()) == list(model.items())
    assert list(queue) == list(model)
    assert list(queue.values()) == list(model.values())
    assert len(queue) == len(model)


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_is_an_ordered_dictionary(seed: int) -> None:
    dice = random.Random(seed)
    keys = dice.sample(KEYS, dice.choice([1, 2, 5, len(KEYS)]))
    queue, model = Queue[int](), OrderedDict[bytes, int]()
    for step in range(400):
        key = dice.choice(keys)
        action = dice.choice(["put", "put", "pop", "delete", "first", "last", "end", "begin",
                              "use", "use", "again", "update", "clear", "drain"])  # fmt: skip
        if action == "put":
            queue[key] = model[key] = step
        elif action == "pop":
            assert queue.pop(key) == model.pop(key, None)
        elif action in ("first", "last") and model:
            last = action == "last"
            assert queue.popitem(last) == model.popitem(last)
        elif action in ("end", "begin") and key in model:
            queue.move_to_end(key, last=action == "end")
            model.move_to_end(key, last=action == "end")
        elif action == "delete" and key in model:
            del queue[key], model[key]
        elif action in ("use", "again"):
            # Of what stands together, and of what does not; some of it twice, some not there.
            start = dice.randrange(len(keys))
            some = list(islice(model, start, start + 5)) if action == "again" else []
            some += dice.choices(keys, k=dice.randrange(6))
            absent = queue.use_all(some)
            assert absent == [one for one in some if one not in model]
            for one in some:
                if one in model:
                    model.move_to_end(one)
        elif action == "update":
            some = dice.sample(keys, min(3, len(keys)))
            queue.update(dict.fromkeys(some, -step))
            model.update(dict.fromkeys(some, -step))
        elif action == "clear" and dice.random() < 0.1:
            queue.clear()
            model.clear()
        elif action == "drain" and dice.random() < 0.1:
            assert list(queue.drain()) == list(model.items())[::-1]
            model.clear()
        assert queue.get(key) == model.get(key)
        assert (key in queue) == (key in model)
        same(queue, model)


def test_a_queue_says_what_is_not_there() -> None:
    queue = Queue[int]()
    with pytest.raises(KeyError):
        queue.popitem()
    with pytest.raises(KeyError):
        queue.move_to_end(b"a")
    with pytest.raises(KeyError):
        del queue[b"a"]
    with pytest.raises(KeyError):
        queue[b"a"]
    same(queue, OrderedDict())


@pytest.mark.parametrize("seed", range(5))
def test_a_table_is_a_dictionary(seed: int) -> None:
    dice = random.Random(seed)
    table, model = Table[int](), dict[bytes, int]()
    for step in range(300):
        key = dice.choice(KEYS)
        action = dice.choice(["put", "put", "pop", "delete", "default"])
        if action == "put":
            table[key] = model[key] = step
        elif action == "pop":
            assert table.pop(key) == model.pop(key, None)
        elif action == "delete" and key in model:
            del table[key], model[key]
        elif action == "default":
            assert table.setdefault(key, step) == model.setdefault(key, step)
        assert table.get(key) == model.get(key)
        assert (key in table, len(table), bool(table)) == (key in model, len(model), bool(model))
        assert dict(table.items()) == model
        assert sorted(table) == sorted(model)
    copy = table.copy()
    assert dict(table.drain()) == model
    assert not table
    assert dict(copy.items()) == model


def test_the_latest_are_about_the_latest() -> None:
    table, dice = Table[int](), random.Random(1)
    keys = [dice.randbytes(32) for _ in range(20 * NUM_PIECES)]
    for key in keys:
        table[key] = 0
    latest = table.latest(64)
    assert len(set(latest)) == 64
    assert set(latest) <= set(keys[-10 * NUM_PIECES :])
    assert set(table.latest(len(keys))) == set(keys)


@pytest.mark.parametrize("seed", range(5))
def test_offsets_are_a_dictionary(seed: int) -> None:
    dice = random.Random(seed)
    offsets, model = Offsets(4096), dict[int, int]()
    for step in range(300):
        offset = 4096 * dice.randrange(60)
        action = dice.choice(["put", "put", "pop", "delete"])
        if action == "put":
            offsets[offset] = model[offset] = step
        elif action == "pop":
            assert offsets.pop(offset) == model.pop(offset, None)
        elif offset in model:
            del offsets[offset], model[offset]
        assert offsets.get(offset) == model.get(offset)
        assert len(offsets) == len(model)
        assert dict(offsets.items()) == model
    with pytest.raises(KeyError):
        offsets[4096 * 60]


@pytest.mark.parametrize("pages", [1, 2, 3, 65, 256, 257, 512, 721, 768, 1024, 4096, 65536])
def test_slots_of_one_size_are_spread(pages: int) -> None:
    offsets = Offsets(4096)
    for number in range(50 * NUM_PIECES):
        offsets[4096 * pages * number] = 1
    assert max(map(len, offsets._pieces)) < 4 * 50


@pytest.mark.parametrize("kind", [Table, Queue])
def test_what_is_copied_in_one_go_is_a_small_part(
    kind: type[Table[int]] | type[Queue[int]],
) -> None:
    table, dice = kind(), random.Random(1)
    for _ in range(50 * NUM_PIECES):
        table[dice.randbytes(32)] = 0
    pieces = table.pieces if isinstance(table, Table) else table._links
    assert len({id(piece) for piece in pieces}) == NUM_PIECES
    assert max(map(len, pieces)) < 2 * 50


ME, NUM_CHUNKS = "pid 1", 1000


def collections_within(root: object) -> Iterator[dict[object, object] | set[object]]:
    """Every dictionary and set that an object holds, however deep."""
    seen, left = {id(root)}, [root]
    while left:
        one = left.pop()
        if isinstance(one, (types.ModuleType, type)):
            continue
        if isinstance(one, (dict, OrderedDict, set)):
            yield one
        # A function holds all that its module does, too.
        within = [one.__closure__] if isinstance(one, types.FunctionType) else gc.get_referents(one)
        left += [new for new in within if id(new) not in seen]
        seen.update(map(id, within))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_nothing_of_a_node_is_one_collection_of_all_chunks(
    policy: str, kind: str, tmp_path: Path
) -> None:
    """Fails where what every chunk adds to would be copied in one go."""

    async def test(node: Node) -> None:
        me, keys = Client(ME), chunk_keys(NUM_CHUNKS)
        for start in range(0, NUM_CHUNKS, 100):
            assert store(node, me, keys[start : start + 100]) == 100
            await flush(node, me)
            release(node, me, match(node, me, keys[start : start + 100]).lease)
        assert len(node.host.index) == NUM_CHUNKS
        assert node.backings[0].holdings()["num_chunks"] == NUM_CHUNKS
        large = [list(one) for one in collections_within(node) if len(one) >= NUM_CHUNKS // 2]
        buckets = range(1 << BUCKET_BITS)
        assert [one[-1] for one in large if not all(key in buckets for key in one)] == []

    tier = DiskTier(tmp_path) if kind == "disk" else MemoryTier()
    on_node(test, slots=NUM_CHUNKS, tier=tier, tier_slots=NUM_CHUNKS, policy=policy)
