"""The records of requests, in pages that nothing falls out of while more come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import UsageError
from kvstrata.node import records
from kvstrata.node.records import NUM_RECORDS, Records
from kvstrata.observe.counters import Counters
from kvstrata.wire.protocol import MAX_PAGE


def kept(count: int) -> Records:
    noted = Records(Counters(), ["host"])
    for number in range(1, count + 1):
        noted.note({"request": f"r{number}", "outcome": "hit"})
    return noted


@given(st.integers(0, 90), st.integers(1, 20), st.integers(0, 30))
def test_pages_follow_on_each_other(count: int, limit: int, between: int) -> None:
    keep = 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "NUM_RECORDS", keep)
        noted = kept(count)
        seen: list[int] = []
        before, newest = 0, count
        while True:
            page, before = noted.page(before, limit)
            assert len(page) <= limit
            assert all(one["request"] == f"r{one['number']}" for one in page)
            seen += [one["number"] for one in page]
            if not before:
                break
            if newest == count:
                newest += between
                for number in range(count + 1, newest + 1):
                    noted.note({"request": f"r{number}", "number": "nonsense"})
    assert seen == list(range(count, count - len(seen), -1)), "once each, and none is passed over"
    if count:
        assert seen[-1] <= max(1, newest - keep + 1), "to the oldest that is kept"


def test_what_no_page_has_is_refused() -> None:
    noted = kept(3)
    for before, limit in [(-1, 1), (0, 0), (0, MAX_PAGE + 1)]:
        with pytest.raises(UsageError, match="a page has 1 to"):
            noted.page(before, limit)


def test_a_full_node_keeps_the_latest() -> None:
    noted = kept(NUM_RECORDS + 5)
    page, more = noted.page(0, 2)
    assert [one["number"] for one in page] == [NUM_RECORDS + 5, NUM_RECORDS + 4]
    assert more == NUM_RECORDS + 4
    page, more = noted.page(8, MAX_PAGE)
    assert [one["number"] for one in page] == [7, 6]
    assert more == 0
