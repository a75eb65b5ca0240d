"""What an owned tier's index keeps of an object, in one number: size, byte order, generation.

Sizes are multiples of 4096, so the low bits have room for the number of a byte order; the high
ones tell an object from every other that had its name before, whatever its size.
"""

from __future__ import annotations

ORDER_MASK = 4095
UNKNOWN_TO_US = ORDER_MASK
"""The order of an object that was read and is of no release, codec or key that is known here."""
GENERATION_SHIFT = 48
_SIZE_MASK = (1 << GENERATION_SHIFT) - 1 - ORDER_MASK


def entry_of(nbytes: int, order: int, generation: int) -> int:
    """The entry of an object; ``order`` is 0 while unknown."""
    return generation << GENERATION_SHIFT | nbytes | order


def size_of(entry: int) -> int:
    """Bytes of the object, header page and padding included."""
    return entry & _SIZE_MASK


def order_of(entry: int) -> int:
    """The number of its byte order, 0 while unknown."""
    return entry & ORDER_MASK


def same_object(entry: int | None, other: int | None) -> bool:
    """Whether two entries are of one and the same object, whatever was learnt of it meanwhile."""
    return (
        entry is not None
        and other is not None
        and entry >> GENERATION_SHIFT == other >> GENERATION_SHIFT
    )
