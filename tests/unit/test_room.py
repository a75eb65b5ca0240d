"""What goes so that objects fit: found before anything is evicted, compared with brute force."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.memory.pool import Pool
from kvstrata.node.common.changes import Cause
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot
from kvstrata.policies import POLICIES, create_policy

PAGE = 4096


def chunk(number: int) -> bytes:
    return bytes([number]) * 32


def new_host(pages: int, policy: str = "lru") -> HostMemory:
    return HostMemory(Pool.create(pages * PAGE), create_policy(policy, pages * PAGE))


def fill(host: HostMemory, number: int, sizes: list[int]) -> list[Slot]:
    """Publish a chunk of objects of so many pages each."""
    slots = [slot for pages in sizes if (slot := host.allocate(pages * PAGE)) is not None]
    assert len(slots) == len(sizes)
    for part, slot in enumerate(slots):
        host.publish(chunk(number), part, slot, "a/b")
        host.unhold(slot)
    return slots


def runs(pages: int, taken: list[Slot]) -> list[tuple[int, int]]:
    """The maximal ranges, in pages, that none of these slots lies in."""
    owner = [False] * pages + [True]
    for slot in taken:
        first = slot.offset // PAGE
        owner[first : first + slot.nbytes // PAGE] = [True] * (slot.nbytes // PAGE)
    found, begin = [], None
    for page, used in enumerate(owner):
        if not used and begin is None:
            begin = page
        elif used and begin is not None:
            found.append((begin, page))
            begin = None
    return found


class Model:
    """The pool by brute force: try the first chunks in the order of use, one more at a time."""

    def __init__(self, pages: int, chunks: dict[bytes, list[Slot]], kept: set[bytes]) -> None:
        self.pages, self.chunks, self.kept = pages, chunks, kept

    def victims(self, need: int, count: int) -> set[bytes]:
        gone: set[bytes] = set()
        for key in [key for key in self.chunks if key not in self.kept]:
            gone.add(key)
            if self.room(gone, need) >= count:
                break
        return {
            key
            for key in gone
            for slot in self.chunks[key]
            for begin, end in self.rooms(gone, need)
            if begin <= slot.offset // PAGE < end
        }

    def rooms(self, gone: set[bytes], need: int) -> list[tuple[int, int]]:
        left = [slot for key, slots in self.chunks.items() if key not in gone for slot in slots]
        return [(a, b) for a, b in runs(self.pages, left) if b - a >= need]

    def room(self, gone: set[bytes], need: int) -> int:
        return sum((b - a) // need for a, b in self.rooms(gone, need))


@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=14),
    seed=st.integers(0, 10**6),
    held=st.sets(st.integers(0, 13)),
    holes=st.sets(st.integers(0, 13)),
    need=st.integers(1, 9),
    count=st.integers(1, 3),
)
def test_as_brute_force_finds_them(
    sizes: list[list[int]], seed: int, held: set[int], holes: set[int], need: int, count: int
) -> None:
    pages = sum(map(sum, sizes))
    with closing(new_host(pages)) as host:
        chunks = {chunk(n): fill(host, n, each) for n, each in enumerate(sizes)}
        for number in sorted(holes & set(range(len(sizes)))):
            host.drop(chunk(number), Cause.CLEARED)
            del chunks[chunk(number)]
        order = list(chunks)
        random.Random(seed).shuffle(order)
        for key in order:
            host.index.touch([key])
        chunks = {key: chunks[key] for key in order}
        kept = {chunk(number) for number in held} & chunks.keys()
        for key in kept:
            host.hold(chunks[key][-1])
        model = Model(pages, chunks, kept)
        # What is free is used first.
        taken = host.allocate_many(need * PAGE, min(model.room(set(), need), count))
        model.chunks, model.kept = {**chunks, b"new": list(taken)}, kept | {b"new"}
        missing = count - len(taken)
        victims = model.victims(need, missing) if missing else set()
        taken += host.allocate_many(need * PAGE, missing)
        gone = {key for key in chunks if key not in host.index}
        assert gone == victims
        assert not gone & kept
        assert host.num_evicted == len(gone)
        assert len(taken) == min(count, count - missing + model.room(gone, need))
        host.check_integrity(taken)
        # Those that stayed have kept their places.
        for key in kept:
            host.unhold(chunks[key][-1])
        left = [key for key in order if key in host.index]
        assert [host.index.victim(lambda _: True) for _ in left] == left


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_cannot_fit_costs_nobody_anything(policy: str) -> None:
    """A held slot in the middle: no five pages next to each other, however much is evicted."""
    with closing(new_host(9, policy)) as host:
        slots = [fill(host, number, [1])[0] for number in range(9)]
        host.hold(slots[4])
        for _ in range(3):
            assert host.allocate(5 * PAGE) is None
            assert (len(host.index), host.num_evicted) == (9, 0)
        host.check_integrity()
        host.unhold(slots[4])
        slot = host.allocate(5 * PAGE)
        assert slot is not None
        assert host.num_evicted == 5
        host.check_integrity([slot])


def test_an_eviction_out_of_turn_is_remembered_like_any_other() -> None:
    """S3-FIFO knows those it evicted, whoever picked them."""
    with closing(new_host(6, "s3fifo")) as host:
        for number in range(6):
            fill(host, number, [1])
        slot = host.allocate(3 * PAGE)
        assert slot is not None
        host.discard(slot)
        host.unhold(slot)
        gone = [number for number in range(6) if chunk(number) not in host.index]
        assert len(gone) == 3
        for number in gone:
            fill(host, number, [1])
        assert set(host.index._policy._main) == {chunk(number) for number in gone}  # type: ignore[attr-defined]


def test_a_search_in_vain_is_not_repeated_for_each_request() -> None:
    with closing(new_host(400)) as host:
        slots = []
        for number in range(400):
            slot = host.allocate(PAGE)
            assert slot is not None
            host.publish(number.to_bytes(32, "big"), 0, slot, "a/b")
            slots.append(slot)
        for slot in slots[1::2]:
            host.unhold(slot)
        find, looks = host.index.victim, 0

        def victim(evictable: Callable[[bytes], bool]) -> bytes | None:
            def look(key: bytes) -> bool:
                nonlocal looks
                looks += 1
                return evictable(key)

            return find(look)

        host.index.victim = victim  # type: ignore[method-assign]
        assert host.allocate(2 * PAGE) is None
        assert looks == 400
        for nbytes in (2 * PAGE, 3 * PAGE):
            assert host.allocate(nbytes) is None
        assert looks == 400
        assert host.allocate_many(PAGE, 0) == []
        for slot in slots[:10:2]:
            host.unhold(slot)
        assert host.allocate(2 * PAGE) is None
        assert looks == 400
        host.unhold(slots[10])
        two = host.allocate(2 * PAGE)
        assert looks > 400
        assert two is not None
        host.check_integrity([two])
