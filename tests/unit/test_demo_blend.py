"""What the demo of blending finds, worked out by hand; the engine's part not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvstrata.cli.demo_blend import (
    WAYS,
    Answered,
    BlendDemo,
    divergence,
    joined,
    named,
    plot,
    summary,
    table,
)

ANSWERS = [
    Answered(order, way, ms, kl, tokens, "are")
    for order in (1, 2)
    for way, ms, kl, tokens in (
        ("computed", 3000.0 * order, 0.0, [1, 2]),
        ("deviation 15%", 1000.0, 0.01 * order, [1, order]),
        ("edges 15%", 600.0, 0.02, [3, 4]),
        ("nothing anew", 300.0, 0.04, [1, 2]),
    )
]


def test_the_divergence_of_two_coins() -> None:
    fair, biased = [math.log(0.5)] * 2, [math.log(0.25), math.log(0.75)]
    assert divergence(fair, fair) == 0
    assert divergence(fair, biased) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence([0.0, -math.inf], biased) == pytest.approx(math.log(4))


def test_each_way_is_compared_with_computing_the_same_order() -> None:
    found = summary(ANSWERS)
    assert list(found) == list(WAYS)
    assert found["computed"]["faster"] == 1
    assert found["deviation 15%"] == {
        "first_ms": 1000, "faster": 4.5, "kl": pytest.approx(0.015), "same_answers": 1, "orders": 2,
    }  # fmt: skip
    assert found["edges 15%"]["same_answers"] == 0


def test_it_prints_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    columns = table(ANSWERS).columns
    assert [list(column.cells)[1] for column in columns] == [
        "deviation 15%", "1,000", "4.5x", "0.0150", "1 of 2",
    ]  # fmt: skip
    assert plot(ANSWERS, tmp_path / "one.png")
    story = BlendDemo(tmp_path)
    story.answers = ANSWERS
    story.report(12.3, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "demo-blend.json").read_text())
    assert len(printed["answers"]) == 8
    assert (tmp_path / "demo-blend.png").read_bytes().startswith(b"\x89PNG")


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_texts_are_named_where_they_are() -> None:
    prompt, segments = joined(Letters(), [[1] * 20, [2] * 30])
    assert [prompt[start:stop] for start, stop in segments] == [[1] * 20, [2] * 30]
    assert named(segments)["kvstrata"]["blend"] == {"segments": segments}
    assert named(segments, ("edges", 0.1))["kvstrata"]["blend"]["ratio"] == 0.1
