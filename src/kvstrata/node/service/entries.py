"""What an owned tier's index keeps of an object, in one number: size, byte order, generation.

Sizes are multiples of 4096, so the low bits have room for the number of a byte order; the high
ones tell an object from every other that had its name before, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def generation_of(entry: int) -> int:
    """Its number among all objects that came, in the order in which they did."""
    return entry >> GENERATION_SHIFT


def same_object(entry: int | None, other: int | None) -> bool:
    """Whether two entries are of one and the same object, whatever was learnt of it meanwhile."""
    return (
        entry is not None
        and other is not None
        and entry >> GENERATION_SHIFT == other >> GENERATION_SHIFT
    )


class Orders:
    """Numbers for the names of byte orders, as they come; 0 for all beyond those that fit."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, order: str) -> int:
        """The number of a byte order."""
        if not order or len(self._numbers) >= UNKNOWN_TO_US - 1:
            return self._numbers.get(order, 0)
        return self._numbers.setdefault(order, len(self._numbers) + 1)

    def readable(self, number: int, orders: Iterable[str] | None) -> bool:
        """Whether an object may be in one of these orders, as far as is known (None: in any)."""
        if number == UNKNOWN_TO_US:
            return False
        return not number or orders is None or any(self._numbers.get(o) == number for o in orders)
