"""Bounds on damage, and the choice of codecs within them."""

from __future__ import annotations

import math
import re

import pytest

from kvstrata.quality.bound import Bound
from kvstrata.quality.choice import RAW, Candidate, Place, allowed, choose
from kvstrata.quality.table import Estimate, Exact, Measured, Scores, Table

GB = 1_000_000_000


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def row(name: str, bits: float, kl: Estimate, retrieval: Estimate | None = None) -> Measured:
    scores = Scores(
        length=0, bits=bits, key_error=0, value_error=0, perplexity=exactly(0.01), kl_mean=kl,
        kl_p99=exactly(0.1), agreement=Estimate(0.98, 0.97, 0.99), retrieval=retrieval,
        rules=exactly(1), rules_nats=exactly(0), rules_by_place=(),
    )  # fmt: skip
    return Measured(
        name=name, family=name, parameters="", lossless=kl.high == 0, encode_gbps=1, decode_gbps=1,
        scores=(scores,),
    )  # fmt: skip


class TestBound:
    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("kl <= 0.01", "kl <= 0.01"),
            ("kl<=1e-2 and  agreement>=98%", "kl <= 0.01 and agreement >= 0.98"),
            ("perplexity <= 1%", "perplexity <= 0.01"),
        ],
    )
    def test_it_reads_what_it_writes(self, text: str, canonical: str) -> None:
        bound = Bound.parse(text)
        assert str(bound) == canonical
        assert Bound.parse(canonical) == bound

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "is not a metric"),
            ("kl", "is not a metric"),
            ("kl <= x", "is not a metric"),
            ("kl < 0.1", "is not a metric"),
            ("speed >= 1", "'speed' is not measured; there are kl"),
            ("kl >= 0.1", "kl is bounded by <="),
            ("agreement <= 98%", "agreement is bounded by >="),
            ("kl <= 1.2.3", "is not a number"),
            ("kl <= 0.1 or kl <= 0.2", "is not a metric"),
        ],
    )
    def test_what_is_wrong_is_said(self, text: str, problem: str) -> None:
        with pytest.raises(ValueError, match=re.escape(problem)):
            Bound.parse(text)

    def test_the_worse_end_of_the_interval_counts(self) -> None:
        scores = row("x", 4, Estimate(0.009, 0.008, 0.011)).at()
        assert not Bound.parse("kl <= 0.01").meets(scores)
        assert Bound.parse("kl <= 0.011").meets(scores)
        assert not Bound.parse("agreement >= 98%").meets(scores)
        assert Bound.parse("agreement >= 97%").meets(scores)
        assert not Bound.parse("kl <= 1 and agreement >= 98%").meets(scores)

    def test_what_was_not_measured_is_not_kept(self) -> None:
        assert not Bound.parse("retrieval >= 0").meets(row("x", 4, exactly(0)).at())
        found = row("x", 4, exactly(0), retrieval=exactly(1))
        assert Bound.parse("retrieval >= 90%").meets(found.at())


def test_only_lossy_rows_within_the_bound_are_allowed() -> None:
    rows = (row("exact", 11, exactly(0)), row("a", 4, exactly(0.001)), row("b", 2, exactly(0.1)))
    table = Table(
        kvstrata="0", model="m", weights="w", text="t", windows=1, lengths=(), machine="",
        exact=tuple[Exact, ...](), codecs=rows, left_out={},
    )  # fmt: skip
    assert [one.name for one in allowed(table.codecs, Bound.parse("kl <= 0.01"))] == ["a"]


class TestChoice:
    LOSSLESS = Candidate("lossless", 11, 1.9 * GB)
    DENSE = Candidate("dense", 4, 0.5 * GB)

    def one(self, bytes_per_s: float, compute_s: float, cores: int = 1) -> str:
        place = Place("disk", 100 * GB, bytes_per_s, cores)
        return choose([RAW, self.LOSSLESS, self.DENSE], [place], compute_s)["disk"]

    def test_a_slow_link_wants_few_bits(self) -> None:
        assert self.one(0.05 * GB, 1e-6) == "dense"

    def test_what_decodes_slower_than_computing_is_useless(self) -> None:
        slow = Candidate("slow", 1, 0.01 * GB)
        place = Place("disk", 100 * GB, 2 * GB, 1)
        assert choose([RAW, slow], [place], compute_s=1 / (0.02 * GB)) == {"disk": "raw"}

    def test_a_fast_tier_is_raw_where_misses_are_cheap(self) -> None:
        # Computing takes hardly longer than loading: what counts is the load, not the room.
        assert self.one(20 * GB, 1e-10) == "raw"

    def test_room_counts_where_misses_are_dear(self) -> None:
        assert self.one(20 * GB, 1e-6) == "dense"

    def test_tiers_are_chosen_together(self) -> None:
        places = [Place("memory", 8 * GB, 10 * GB, 8), Place("disk", 500 * GB, 0.1 * GB, 8)]
        assert choose([RAW, self.LOSSLESS, self.DENSE], places, 1e-6) == {
            "memory": "dense",
            "disk": "dense",
        }

    def test_nothing_is_divided_by_nothing(self) -> None:
        assert math.isinf(RAW.decode_bytes_per_s)
        assert RAW.load_s(Place("x", 1, GB, 1)) == 1 / GB
