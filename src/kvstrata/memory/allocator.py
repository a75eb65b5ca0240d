"""Who may use which part of the pool: exact sizes, and never more than there is."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from kvstrata.errors import UsageError
from kvstrata.tables import Offsets

ALIGNMENT = 4096


class SlotAllocator:
    """Hand out aligned ranges of `[0, capacity_bytes)`: best fit, neighbours joined on free.

    Among free ranges of the best size the one freed last is taken (its pages are warm). A fresh
    allocator hands out the lowest offsets first, the order in which the pool is faulted in.
    Both verbs take a few dictionary operations plus a search among the distinct free sizes, of
    which there are at most `sqrt(2 * capacity_bytes / alignment)`.

    Not thread-safe: the node's loop owns it.

    Args:
        capacity_bytes: rounded down to a multiple of `alignment`.
        alignment: bytes; every offset and every size is a multiple of it.
    Raises:
        UsageError: the capacity is below one alignment, or the alignment is not positive.
    """

    def __init__(self, capacity_bytes: int, alignment: int = ALIGNMENT) -> None:
        if alignment <= 0 or capacity_bytes < alignment:
            raise UsageError(f"capacity {capacity_bytes} does not hold one slot of {alignment}")
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self._live = Offsets(alignment)  # offset -> size
        self._free_size = Offsets(alignment)  # offset -> size
        self._free_at_end = Offsets(alignment)  # offset + size -> offset
        self._bins: dict[int, dict[int, None]] = {}  # size -> offsets, a stack with removal
        self._sizes: list[int] = []  # the keys of _bins, ascending
        self._last_size = 0
        self._allocated_bytes = 0
        self._add_free(0, self.capacity_bytes)

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    def __len__(self) -> int:
        """The number of live allocations."""
        return len(self._live)

    def allocate(self, nbytes: int) -> int | None:
        """Return the offset of a range of `nbytes` rounded up to the alignment, or None.

        Raises:
            UsageError: `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise UsageError(f"cannot allocate {nbytes} bytes")
        need = self.rounded(nbytes)
        # Slots mostly come in one size: sharing its number saves a quarter of the memory.
        need = self._last_size = self._last_size if need == self._last_size else need
        place = bisect_left(self._sizes, need)
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        offset, _ = self._bins[size].popitem()
        if not self._bins[size]:
            del self._bins[size]
            del self._sizes[place]
        del self._free_size[offset]
        del self._free_at_end[offset + size]
        if size > need:
            self._add_free(offset + need, size - need)
        self._live[offset] = need
        self._allocated_bytes += need
        return offset

    def rounded(self, nbytes: int) -> int:
        """What an allocation of ``nbytes`` takes."""
        return -(-nbytes // self.alignment) * self.alignment

    def free(self, offset: int) -> None:
        """Give a range back.

        Raises:
            UsageError: no live allocation begins at `offset`; nothing has changed.
        """
        size = self._live.pop(offset)
        if size is None:
            raise UsageError(f"no allocation begins at offset {offset}")
        self._allocated_bytes -= size
        end = offset + size
        after = self._free_size.get(end)
        if after is not None:
            self._remove_free(end, after)
            end += after
        before = self._free_at_end.get(offset)
        if before is not None:
            self._remove_free(before, offset - before)
            offset = before
        self._add_free(offset, end - offset)

    def trial(self) -> Trial:
        """What would be free if some allocations were given back."""
        return Trial(self._live, self._free_size, self._free_at_end)

    def check_integrity(self) -> None:
        """Assert that live and free ranges tile the capacity, with no two free neighbours."""
        ranges = [(offset, size, True) for offset, size in self._live.items()]
        ranges += [(offset, size, False) for offset, size in self._free_size.items()]
        ranges.sort()
        end, live_bytes, after_free = 0, 0, False
        for offset, size, live in ranges:
            assert offset == end, f"overlap or gap: [{end}, {offset})"
            assert size > 0
            assert size % self.alignment == 0, f"size {size} at {offset} is not aligned"
            assert live or not after_free, f"free neighbours not joined at {offset}"
            end, after_free = offset + size, not live
            live_bytes += size if live else 0
        assert end == self.capacity_bytes, f"{end} bytes tiled of {self.capacity_bytes}"
        assert live_bytes == self._allocated_bytes
        assert self._sizes == sorted(self._bins)
        binned = {offset: size for size, bin_ in self._bins.items() for offset in bin_}
        assert binned == dict(self._free_size.items())
        ends = {offset + size: offset for offset, size in self._free_size.items()}
        assert ends == dict(self._free_at_end.items())

    def _add_free(self, offset: int, size: int) -> None:
        self._free_size[offset] = size
        self._free_at_end[offset + size] = offset
        offsets = self._bins.get(size)
        if offsets is None:
            self._bins[size] = {offset: None}
            insort(self._sizes, size)
        else:
            offsets[offset] = None

    def _remove_free(self, offset: int, size: int) -> None:
        del self._free_size[offset]
        del self._free_at_end[offset + size]
        offsets = self._bins[size]
        del offsets[offset]
        if not offsets:
            del self._bins[size]
            del self._sizes[bisect_left(self._sizes, size)]


class Trial:
    """What would be free if some allocations were given back; changes nothing.

    Good until something is allocated or freed.
    """

    def __init__(self, live: Offsets, free_size: Offsets, free_at_end: Offsets) -> None:
        self._live = live
        self._free_size = free_size
        self._free_at_end = free_at_end
        self._end: dict[int, int] = {}  # begin -> end of what would be free, neighbours joined
        self._begin: dict[int, int] = {}  # end -> begin

    def free(self, offset: int, nbytes: int) -> int:
        """Suppose that an allocation were given back.

        Returns:
            How many allocations of ``nbytes`` that adds, ``nbytes`` being aligned.
        """
        begin, end = offset, offset + self._live[offset]
        after = self._end.pop(end, 0) or end + (self._free_size.get(end) or 0)
        before = self._begin.pop(begin, None)
        if before is None:
            free = self._free_at_end.get(begin)
            before = begin if free is None else free
        self._end[before], self._begin[after] = after, before
        return (after - before) // nbytes - (after - end) // nbytes - (begin - before) // nbytes

    def allocations(self, nbytes: int) -> Iterator[int]:
        """The offsets of what is to be given back for all ranges of ``nbytes`` or more."""
        for at, end in self._end.items():
            if end - at >= nbytes:
                while at < end:
                    size = self._free_size.get(at)
                    if size is None:
                        yield at
                        size = self._live[at]
                    at += size
