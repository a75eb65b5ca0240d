"""Units: each spelling has one exact value, and what is printed parses back to it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.units import (
    DURATION_UNITS,
    MAX_DURATION,
    MAX_SIZE,
    SIZE_UNITS,
    approximate_size,
    format_duration,
    format_fraction,
    format_rate,
    format_size,
    parse_duration,
    parse_fraction,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        (" 512MB ", 512_000_000),
        ("1.5KiB", 1536),
        ("0.1GB", 100_000_000),  # in floats 0.1 * 10**9 is whole only by luck
        ("1.1TB", 1_100_000_000_000),
        ("7B", 7),
        ("2TiB", 2 << 40),
        ("3kB", 3000),
        (4096, 4096),
        (0, 0),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("8", "has no unit"),
        ("8G", "unknown unit 'G'"),
        ("8gib", "unknown unit 'gib'"),
        ("8GiB/s", "unknown unit 'GiB/s'"),
        ("-8GiB", "negative"),
        (-1, "negative"),
        ("0.3KiB", "whole number of bytes"),
        ("GiB", "is not a size"),
        ("", "is not a size"),
        ("1e3GiB", "is not a size"),
        ("٣GiB", "is not a size"),  # a digit to str.isdigit
        ("1GiB 2GiB", "is not a size"),
        ("9999999TiB", "more than any file"),
        ("9" * 5000, "is not a size"),
    ],
)
def test_bad_sizes_name_the_problem(text: str | int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_size(text)


@pytest.mark.parametrize("value", [True, 1.5, None, [], {}])
def test_only_text_and_whole_numbers_are_sizes(value: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(value)


def test_a_wrong_unit_lists_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB"):
        parse_size("8Gb")
    with pytest.raises(ValueError, match="one of us, ms, s, min, h, d"):
        parse_duration("5 sec")
    with pytest.raises(ValueError, match="one of B/s, KiB/s"):
        parse_rate("32MiB")
    with pytest.raises(ValueError, match="one of %"):
        parse_fraction("0.2")


@given(st.integers(0, MAX_SIZE))
def test_sizes_round_trip(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


@given(st.integers(1, 999), st.sampled_from(sorted(SIZE_UNITS)))
def test_a_size_is_printed_no_longer_than_it_was_written(number: int, unit: str) -> None:
    assert len(format_size(number * SIZE_UNITS[unit])) <= len(f"{number}{unit}")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0B"), (8 << 30, "8GiB"), (512_000_000, "512MB"), (1536, "1536B"), (1000, "1kB")],
)
def test_size_spellings(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (5_123_456_789, "4.77GiB"), (1 << 39, "512GiB")],
)
def test_approximate_sizes(num_bytes: int, text: str) -> None:
    assert approximate_size(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("2s", 2.0), ("1.5min", 90.0), ("1h", 3600.0), ("40us", 4e-5), ("0s", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["5", 5, 0.25, "5S", "-5s", "inf s", "nans", "4000d", None, True])
def test_bad_durations(value: str) -> None:
    with pytest.raises(ValueError, match=r"unit|duration|negative|ten years"):
        parse_duration(value)


@given(st.decimals(0, MAX_DURATION, places=9))
def test_durations_round_trip(seconds: object) -> None:
    value = parse_duration(f"{seconds:f}s")
    assert parse_duration(format_duration(value)) == value


@given(st.integers(1, 365), st.sampled_from(sorted(DURATION_UNITS)))
def test_a_duration_is_printed_no_longer_than_it_was_written(number: int, unit: str) -> None:
    value = parse_duration(f"{number}{unit}")
    assert len(format_duration(value)) <= len(f"{number}{unit}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250ms"), (5.0, "5s"), (0.1, "100ms"), (1.5, "1.5s"), (5400.0, "1.5h"), (0.0, "0us")],
)
def test_duration_spellings(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "bytes_per_s"), [("32MiB/s", 32 << 20), ("1 GB/s", 10**9), (0, 0), ("0", 0)]
)
def test_rates(text: str | int, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("value", ["32MiB", 32, "-1B/s", False, "0.5B/s", "1/s"])
def test_bad_rates(value: str | int) -> None:
    with pytest.raises(ValueError, match=r"unit|rate|negative|whole"):
        parse_rate(value)


@given(st.integers(0, MAX_SIZE))
def test_rates_round_trip(bytes_per_s: int) -> None:
    assert parse_rate(format_rate(bytes_per_s)) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "share"),
    [("20%", Fraction(1, 5)), ("0.1%", Fraction(1, 1000)), ("100 %", Fraction(1)), ("0%", 0)],
)
def test_fractions(text: str, share: Fraction) -> None:
    assert parse_fraction(text) == share


@pytest.mark.parametrize("value", ["101%", "-1%", "20", 0.2, 20, "%"])
def test_bad_fractions(value: str) -> None:
    with pytest.raises(ValueError, match=r"100%|negative|unit|percentage"):
        parse_fraction(value)


@given(st.integers(0, 10**8))
def test_fractions_round_trip(millionths_of_a_percent: int) -> None:
    share = Fraction(millionths_of_a_percent, 10**8)
    assert parse_fraction(format_fraction(share)) == share


def test_a_third_has_no_percentage() -> None:
    with pytest.raises(ValueError, match="finite decimal"):
        format_fraction(Fraction(1, 3))
