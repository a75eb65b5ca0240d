"""Sizes, durations, rates and percentages as people write them, parsed and printed exactly.

Every quantity is a number and a unit: ``"8GiB"``, ``"250ms"``, ``"32MiB/s"``, ``"20%"``. A unit is
never guessed and its case matters. Arithmetic is exact: a size is a whole number of bytes, and
what a ``format_*`` function prints parses back to the same value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias

SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
"""Bytes in each unit; binary before decimal, so that a tie is printed in binary."""

DURATION_UNITS: Mapping[str, Fraction] = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 10**3),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
"""Seconds in each unit."""

MAX_SIZE = 2**63 - 1
"""The largest file offset; nothing is larger."""

MAX_DURATION = 10 * 365 * 86400
"""Ten years in seconds: a longer wait is a slip, and timers overflow on it."""

_Units: TypeAlias = "Mapping[str, int] | Mapping[str, Fraction]"

# The digits are bounded, so that no input is slow to convert; the bounds admit all we print.
_QUANTITY = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?) ?([A-Za-z%/]*)")


def parse_size(value: str | int) -> int:
    """Bytes in a size such as ``"8GiB"``, ``"512 MB"`` or a bare int of bytes.

    Raises:
        ValueError: no such unit, negative, or not a whole number of bytes, or too large.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _whole_bytes(Fraction(value), value)
    return _whole_bytes(_quantity(value, "size", SIZE_UNITS), value)


def format_size(num_bytes: int) -> str:
    """The shortest exact spelling: ``format_size(8 << 30) == "8GiB"``."""
    return _shortest(Fraction(num_bytes), SIZE_UNITS)


def approximate_size(num_bytes: int) -> str:
    """A size for people to read, rounded to three digits: ``"4.77GiB"``. Not for parsing back."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if num_bytes >= SIZE_UNITS[larger]:
            unit = larger
    amount = num_bytes / SIZE_UNITS[unit]
    return f"{amount:.0f}{unit}" if amount >= 100 else f"{amount:.3g}{unit}"


def parse_duration(value: str) -> float:
    """Seconds in a duration such as ``"250ms"`` or ``"1.5min"``; a bare number is refused.

    Raises:
        ValueError: no unit, no such unit, negative, or longer than ten years.
    """
    amount = _quantity(value, "duration", DURATION_UNITS)
    if amount > MAX_DURATION:
        raise ValueError(f"{value!r} is longer than ten years")
    return float(amount)


def format_duration(seconds: float) -> str:
    """The shortest exact spelling: ``format_duration(0.25) == "250ms"``."""
    # repr is the shortest decimal that reads back as this float.
    return _shortest(Fraction(repr(seconds)), DURATION_UNITS)


def parse_rate(value: str | int) -> int:
    """Bytes a second in a rate such as ``"32MiB/s"``; ``0`` needs no unit.

    Raises:
        ValueError: no such unit, negative, or not a whole number of bytes a second.
    """
    if value == "0" or (value == 0 and not isinstance(value, bool)):
        return 0
    units = {f"{unit}/s": size for unit, size in SIZE_UNITS.items()}
    return _whole_bytes(_quantity(value, "rate", units), value)


def format_rate(bytes_per_s: int) -> str:
    """The shortest exact spelling: ``"32MiB/s"``, and ``"0"`` for none."""
    return f"{format_size(bytes_per_s)}/s" if bytes_per_s else "0"


def parse_fraction(value: str) -> Fraction:
    """The share in a percentage such as ``"20%"``: Fraction(1, 5).

    Raises:
        ValueError: no percent sign, negative, or above 100%.
    """
    amount = _quantity(value, "percentage", {"%": Fraction(1, 100)})
    if amount > 1:
        raise ValueError(f"{value!r} is more than 100%")
    return amount


def format_fraction(share: Fraction) -> str:
    """The exact percentage: ``format_fraction(Fraction(1, 5)) == "20%"``.

    Raises:
        ValueError: the percentage has no finite decimal spelling.
    """
    return f"{_spell(share * 100)}%"


def _quantity(value: object, what: str, units: _Units) -> Fraction:
    accepted = f"a {what} is a number and one of {', '.join(units)}"
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a {what}; {accepted}")
    match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a {what}; {accepted}")
    number, unit = match.groups()
    if unit not in units:
        problem = f"unknown unit {unit!r} in {value!r}" if unit else f"{value!r} has no unit"
        raise ValueError(f"{problem}; {accepted}")
    if number.startswith("-"):
        raise ValueError(f"{value!r} is negative")
    return Fraction(number) * units[unit]


def _whole_bytes(amount: Fraction, value: object) -> int:
    if amount < 0:
        raise ValueError(f"{value!r} is negative")
    if amount.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    if amount > MAX_SIZE:
        raise ValueError(f"{value!r} is more than any file can hold")
    return amount.numerator


def _shortest(amount: Fraction, units: _Units) -> str:
    """Of all exact spellings with a number of at least 1 the shortest, the first of equals."""
    smallest = next(iter(units))
    spellings = [_spell(amount / units[smallest]) + smallest]
    for unit, size in units.items():
        if amount >= size and _is_decimal(amount / size):
            spellings.append(_spell(amount / size) + unit)
    return min(spellings, key=len)


def _is_decimal(amount: Fraction) -> bool:
    """Whether finitely many decimals suffice: the denominator has no factor but 2 and 5."""
    enough: int = 10 ** amount.denominator.bit_length()
    return enough % amount.denominator == 0


def _spell(amount: Fraction) -> str:
    if not _is_decimal(amount):
        raise ValueError(f"{amount} has no finite decimal spelling")
    decimals = 0
    while (amount * 10**decimals).denominator != 1:
        decimals += 1
    digits = str((amount * 10**decimals).numerator).rjust(decimals + 1, "0")
    return f"{digits[:-decimals]}.{digits[-decimals:]}" if decimals else digits
