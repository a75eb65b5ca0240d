"""Tables and queues against the dictionaries of the library, and that no change in them is long."""

from __future__ import annotations

import random
from collections import OrderedDict
from itertools import islice

import pytest

from kvstrata.tables import NUM_PIECES, Queue, Table

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
                              "use", "use", "again", "update", "clear"])  # fmt: skip
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
