"""The table of blending on numbers worked out by hand, and what a bound picks from it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvstrata.blend import Rule
from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.quality.blending.choice import pick_blend
from kvstrata.quality.blending.table import (
    BlendTable,
    Row,
    find,
    load,
    path_for,
    save,
    shipped_path,
)
from kvstrata.quality.blending.ways import BOUNDS
from kvstrata.quality.bound import Bound
from kvstrata.quality.table import Estimate

WEIGHTS = "ab" * 32


def row(
    plan: str,
    ratio: float,
    kl: float,
    worst: float | None = None,
    bound: float | None = None,
    computed: float | None = None,
) -> Row:
    exact = Estimate(kl, kl, kl if worst is None else worst)
    same = Estimate(1.0, 1.0, 1.0)
    return Row(
        plan=plan,
        ratio=ratio,
        bound=bound,
        computed=ratio if computed is None else computed,
        kl_mean=exact,
        kl_p95=exact,
        closed=same,
        over_random=None,
        perplexity=exact,
        agreement=same,
        answer_nats=exact,
        retrieval=None,
        found=(1.0, 0.5),
    )


def table(*rows: Row) -> BlendTable:
    return BlendTable(
        kvstrata="0.1.0",
        model="a-model",
        weights=WEIGHTS,
        layers=30,
        text="00",
        windows=20,
        documents=2,
        document_tokens=256,
        perplexity=7.0,
        found=(1.0, 0.5),
        rows=rows,
        left_out={"droidspeak": "no other model"},
    )


ROWS = (
    row("unturned", 0.0, 0.5),
    row("none", 0.0, 0.04),
    row("random", 0.05, 0.0001),
    # Better than what is picked in its place, but for texts of several places alone.
    row("anchors", 0.0, 0.011),
    row("anchors", 0.15, 0.007),
    row("edges", 0.15, 0.03),
    row("edges", 0.3, 0.019, worst=0.021),
    row("edges", 0.5, 0.012),
    row("deviation", 0.15, 0.015),
    row("deviation", 0.3, 0.008),
    row("deviation", 1.0, 0.014, bound=0.5, computed=0.12),
    row("deviation", 1.0, 0.004, bound=0.1, computed=0.4),
    row("share", 0.5, 0.022, computed=0.1),
    row("all", 1.0, 0.0),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return path_for(WEIGHTS)


class TestFile:
    def test_it_comes_back_as_it_was(self, cache: Path) -> None:
        assert find(WEIGHTS) is None
        save(table(*ROWS), cache)
        assert find(WEIGHTS) == table(*ROWS)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"version": 2}, Incompatible),
            ({"layers": 0}, CorruptObject),
            ({"more": 1}, CorruptObject),
            ({"rows": [{**msgspec.to_builtins(ROWS[0]), "ratio": 1.5}]}, CorruptObject),
            ({"rows": [{**msgspec.to_builtins(ROWS[0]), "bound": 1.5}]}, CorruptObject),
        ],
    )
    def test_what_is_no_table_is_refused(
        self, cache: Path, change: dict[str, object], error: type[Exception]
    ) -> None:
        save(table(*ROWS), cache)
        cache.write_text(json.dumps({**json.loads(cache.read_bytes()), **change}))
        with pytest.raises(error):
            load(cache)

    def test_a_row_is_found_by_plan_and_ratio(self) -> None:
        assert table(*ROWS).row("edges", 0.3).kl_mean.value == 0.019
        with pytest.raises(UsageError, match=r"no edges 0\.2"):
            table(*ROWS).row("edges", 0.2)
        assert table(*ROWS).row("deviation", 1.0, 0.1).kl_mean.value == 0.004
        with pytest.raises(UsageError, match=r"no deviation 1 bound 0\.2"):
            table(*ROWS).row("deviation", 1.0, 0.2)


class TestPick:
    @pytest.mark.parametrize(
        ("bound", "picked"),
        [
            ("kl <= 0.1", Rule("none", 0.0)),
            ("kl <= 0.035", Rule("edges", 0.15)),
            # 10% by deviation cost as much as 20% of edges and the check.
            ("kl <= 0.025", Rule("share", 0.5)),
            # 30% of edges would do by its mean, not by its worse end. 12% by deviation, which is
            # what the bound took on average, cost less than 15% of them, and 50% of edges more.
            ("kl <= 0.02", Rule("deviation", 1.0, 0.5)),
            ("kl <= 0.01", Rule("deviation", 0.3)),
            ("kl <= 0.005", Rule("deviation", 1.0, 0.1)),
        ],
    )
    def test_the_cheapest_that_keeps_the_bound(self, cache: Path, bound: str, picked: Rule) -> None:
        save(table(*ROWS), cache)
        assert pick_blend(WEIGHTS, Bound.parse(bound)) == picked

    def test_neither_a_baseline_nor_computing_all_is_picked(self, cache: Path) -> None:
        save(table(*ROWS), cache)
        why = pick_blend(WEIGHTS, Bound.parse("kl <= 0.001"))
        assert isinstance(why, str)
        assert "no plan that was measured on a-model keeps kl <= 0.001" in why

    def test_what_was_not_measured_is_not_kept(self, cache: Path) -> None:
        save(table(*ROWS), cache)
        for bound in ("retrieval >= 50%", "rules >= 1%"):
            assert isinstance(pick_blend(WEIGHTS, Bound.parse(bound)), str)

    def test_without_a_table_it_says_how_to_make_one(self, cache: Path) -> None:
        for weights in (WEIGHTS, "hub:org/model@main"):
            assert "quality MODEL --blend" in pick_blend(weights, Bound.parse("kl <= 1"))

    def test_a_broken_table_is_said(self, cache: Path) -> None:
        cache.parent.mkdir(parents=True)
        cache.write_text("{")
        assert "cannot be read" in pick_blend(WEIGHTS, Bound.parse("kl <= 1"))


@pytest.mark.parametrize(
    "path", sorted(shipped_path("").parent.glob("*.json")), ids=lambda p: p.stem[:8]
)
def test_what_the_package_has_is_a_whole_table(path: Path, cache: Path) -> None:
    shipped = load(path)
    assert find(path.stem) == shipped
    assert shipped.weights == path.stem
    assert shipped.windows >= 20
    none, every = shipped.row("none", 0.0), shipped.row("all", 1.0)
    assert every.kl_mean.high < 1e-4 < none.kl_mean.low
    for plan in ("edges", "deviation"):
        for ratio in (0.05, 0.15, 0.3, 0.5):
            assert shipped.row(plan, ratio).computed == pytest.approx(ratio, abs=0.01)
    taken = [shipped.row("deviation", 1.0, bound).computed for bound in BOUNDS]
    assert 0 < taken[0] < taken[1] < taken[2] < 1
    assert pick_blend(path.stem, Bound.parse(f"kl <= {none.kl_mean.high}")) == Rule("none", 0.0)
