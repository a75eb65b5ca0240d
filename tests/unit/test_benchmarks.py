"""The benchmarks' table, their statistics and their page; nothing here is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.__main__ import BENCHMARKS, Failed, node_rows
from benchmarks.against.run import compared
from benchmarks.common import Row, Wrong, spread, table
from benchmarks.intervals import percentile_ratio
from benchmarks.report import END, PAGE, START, insert, render

ROOT = Path(__file__).parents[2]


def test_a_row_is_judged_by_its_bound() -> None:
    assert Row("x", "ratio", 1.12, 1.12).ok is True
    assert Row("x", "ratio", 1.13, 1.12).ok is False
    assert Row("x", "speed", 0.79, 0.8, at_most=False).ok is False
    assert Row("x", "for information", 3.0, None).ok is None
    assert Row("x", "nothing was measured", float("nan"), 1.0).ok is False


def test_a_row_survives_json() -> None:
    row = Row("x", "speed", 0.79, 0.8, at_most=False, unit="GB/s", detail="n = 3")
    assert Row.from_dict(row.to_dict()) == row


def test_the_table_marks_what_falls_short() -> None:
    lines = table([Row("x", "good", 1.0, 1.1), Row("x", "bad", 1.2, 1.1)]).splitlines()
    assert "yes" in lines[2]
    assert "NO" in lines[3]


def test_spread_is_the_median_and_its_quartiles() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert found.relative_iqr == pytest.approx(2 / 3)
    assert 1.0 <= found.ci_low <= found.median <= found.ci_high <= 5.0


def test_percentiles_are_of_all_rounds_and_vary_with_them() -> None:
    ours, theirs = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    found = percentile_ratio(ours, theirs, 50)
    assert found.value == pytest.approx(2.5 / 1.5)
    # Either round alone is a draw, too.
    assert found.low <= 2.0 <= found.high
    same = percentile_ratio(ours, ours, 90)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


def test_rounds_without_a_pair_are_an_error() -> None:
    with pytest.raises(Wrong):
        percentile_ratio([[1.0]], [[1.0], [1.0]], 50)


def test_a_tree_is_slower_only_where_its_whole_interval_says_so() -> None:
    old = [Row("x", "ratio", value, 1.1) for value in (1.0, 1.0, 1.0, 1.0)]
    noisy = [Row("x", "ratio", value, 1.1) for value in (1.0, 1.1, 1.2, 1.01)]
    slow = [Row("x", "ratio", value, 1.1) for value in (1.1, 1.09, 1.08, 1.07)]
    assert compared("ratio", noisy, old).ok
    assert compared("ratio", slow, old).ok is False
    # Where more is better, less of it is worse.
    speeds = [Row("x", "speed", value, 0.8, at_most=False) for value in (0.9, 0.89, 0.91, 0.9)]
    whole = [Row("x", "speed", 1.0, 0.8, at_most=False)] * 4
    assert compared("speed", speeds, whole).ok is False
    assert compared("speed", whole, speeds).ok


def test_no_measurement_is_an_error() -> None:
    with pytest.raises(Wrong):
        spread([])


def test_the_node_benchmark_is_understood() -> None:
    rows = node_rows(
        "2 CPUs, Python 3.11.7\n"
        "what | measured | must reach\n"
        "match of 782 keys | median 0.90 ms, p99 5.31 ms (n = 90) | median <= 2 ms, p99 <= 5 ms\n"
        "memory of objects | 345 MB | <= 600 MB\n"
        "lookup | median 0.41 ms, worst 0.61 ms | <= 3 ms\n"
        "entering them | 3.2 us each | \n"
    )
    assert [(row.what, row.measured, row.bound, row.ok) for row in rows] == [
        ("match of 782 keys, median", 0.90, 2.0, True),
        ("match of 782 keys, p99", 5.31, 5.0, False),
        ("memory of objects", 345.0, 600.0, True),
        ("lookup", 0.41, 3.0, True),
        ("entering them", 3.2, None, None),
    ]


def test_a_node_benchmark_without_rows_failed() -> None:
    with pytest.raises(Failed):
        node_rows("something else")


def test_every_benchmark_has_its_folder_and_its_line_on_the_page() -> None:
    page = PAGE.read_text()
    for name in BENCHMARKS:
        assert (ROOT / "benchmarks" / name / "README.md").is_file(), name
        assert f"`benchmarks/{name}`" in page, name


def test_results_go_between_the_markers_and_nowhere_else() -> None:
    rows = [Row("x", "a ratio", 1.05, 1.12, detail="n = 8").to_dict()]
    section = render({"machine": {"cpu": "a cpu", "seconds": {"x": 60.0}}, "rows": rows})
    page = insert(PAGE.read_text(), section)
    assert insert(page, section) == page
    assert "| a ratio | 1.050 | ≤ 1.12 | yes | n = 8 |" in page
    before = PAGE.read_text().partition(START)[0]
    assert page.startswith(before)
    assert page.partition(END)[2] == PAGE.read_text().partition(END)[2]


def test_a_page_without_markers_is_left_alone() -> None:
    with pytest.raises(ValueError, match="once each"):
        insert("no markers", "section")
