"""Which chunks have to go so that objects fit: looked for first, evicted then.

The pool is handed out in ranges, so room is a matter of neighbours. Chunks are looked at in the
policy's order and each is supposed to be gone, until what would be free next to each other is
enough. Of those looked at only the ones that lie where there would be room go, and the others keep
their places; so where all of them together would not do, none goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstrata.memory.allocator import SlotAllocator
from kvstrata.node.common.index import Index
from kvstrata.node.slots.slot import Slot


def chunks_to_drop(
    index: Index[Slot],
    allocator: SlotAllocator,
    evictable: Callable[[bytes], bool],
    nbytes: int,
    count: int,
) -> Iterable[bytes]:
    """The chunks to drop for some objects, or for as many of them as can be had.

    Those answered have left the policy already.

    Args:
        index: of the pool; its policy orders the chunks.
        allocator: of the pool; it has no room for even one of the objects.
        evictable: whether a chunk may go.
        nbytes: of an object, aligned.
        count: of the objects.
    """
    trial = allocator.trial()
    owners: dict[int, bytes] = {}
    looked_at: dict[bytes, None] = {}
    won = 0

    def look(key: bytes) -> bool:
        nonlocal won
        if key in looked_at or not evictable(key):
            return False
        looked_at[key] = None
        for _, slot in index.objects(key):
            owners[slot.offset] = key
            won += trial.free(slot.offset, nbytes)
        return won >= count

    last = index.victim(look)
    chosen = dict.fromkeys(owners[offset] for offset in trial.allocations(nbytes)) if won else {}
    assert last is None or last in chosen
    for key in looked_at:
        if key in chosen:
            if key != last:
                index.take(key)
        else:
            index.unpark(key)
    return chosen
