"""What selections do to answers: the table's rules by hand, the whole on a little model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.little_models import byte_pairs, little

from kvstrata.codecs import CODECS
from kvstrata.errors import UsageError
from kvstrata.quality import tasks
from kvstrata.quality.models import Model
from kvstrata.quality.run import held_out_text
from kvstrata.quality.selections import run, table
from kvstrata.quality.selections.forms import HEADINGS, cells, markdown, ordered, verdict
from kvstrata.quality.selections.table import Row, Table, best_codec, frontier
from kvstrata.quality.selections.window import CONTINUATION, FACTS, Window
from kvstrata.quality.table import Estimate
from kvstrata.selection.evidence import Context
from kvstrata.selection.kept import payload_bytes
from kvstrata.selection.methods import METHODS
from kvstrata.selection.select import of_context, rows_of

LENGTH = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little("Llama", byte_pairs(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(folder)


@pytest.fixture(scope="module")
def window(model: Model) -> Window:
    return Window(model, pieces(model)[0], LENGTH, 0)


def pieces(model: Model) -> list[list[int]]:
    return tasks.windows(model.tokenizer, held_out_text(), LENGTH + CONTINUATION + 1, 1)


def context_of(model: Model, window: Window) -> Context:
    return Context(model.causal, model.layers(window.kv), window.tokens)


def row(name: str, kind: str, bits: float, kl: float, fraction: float = 1.0) -> Row:
    value = Estimate(kl, kl, kl)
    return Row(
        name=name,
        kind=kind,
        identity=name,
        fraction=fraction,
        bits=bits,
        seconds=1.0,
        perplexity=value,
        kl=value,
        questions=Estimate(2 * kl, 0, 1),
        worst=value,
        agreement=Estimate(0.5, 0.4, 0.6),
        retrieval=None,
        rules=Estimate(0.25, 0, 1),
        rules_by_place=(0.25, 0.75),
    )


ROWS = (
    row("int4", "codec", 4.5, 0.02),
    row("int8", "codec", 8.4, 0.001),
    row("good", "method", 4.6, 0.01, 0.25),
    row("bad", "method", 8.5, 0.03, 0.5),
    row("small", "kvpress", 2.0, 0.5, 0.125),
)


class TestTable:
    def test_who_is_beaten_by_a_codec_at_no_more_bytes(self) -> None:
        _, _, good, bad, small = ROWS
        assert best_codec(good, ROWS) == ROWS[0]
        assert verdict(good, ROWS) == "text: beats int4; questions: beats int4"
        assert verdict(bad, ROWS) == "text: loses to int8; questions: loses to int8"
        assert best_codec(small, ROWS) is None
        assert verdict(small, ROWS) == "none is as small"
        assert verdict(ROWS[0], ROWS) == ""
        # As good is not better.
        tie = msgspec.structs.replace(good, kl=ROWS[0].kl)
        assert verdict(tie, ROWS).startswith("text: loses to int4")

    def test_codecs_and_selections_have_one_frontier(self) -> None:
        assert frontier(ROWS) == {"small 0.125", "int4", "good 0.25", "int8"}

    def test_order_and_words(self) -> None:
        whole = Table(
            kvstrata="0",
            model="m",
            weights="w" * 20,
            windows=1,
            length=LENGTH,
            questions=16,
            machine="here",
            exact_perplexity=2.0,
            exact_retrieval=0.5,
            rows=ROWS,
            left_out={"evolkv": "no table"},
        )
        names = [one.name for one in ordered(whole)]
        assert names == ["int4", "int8", "bad", "good", "small"]
        assert all(len(cells(one, ROWS)) == len(HEADINGS) for one in ROWS)
        text = markdown(whole)
        assert "| `good` * | 25.0% | 4.60 | 3.48 |" in text
        assert "| `bad` | 50.0% |" in text
        assert "- `evolkv`: no table" in text
        assert "| `int8` | all | 25.0% | 75.0% |" in text


class TestWindow:
    def test_everything_kept_answers_as_the_exact_cache(self, model: Model, window: Window) -> None:
        context = context_of(model, window)
        answered = window.selected(of_context(context, "snapkv", rows_of(context, fraction=1.0)))
        assert answered.kl < 1e-6
        assert max(answered.questions) < 1e-6
        assert answered.agreement == 1.0
        assert answered.rules == [1.0] * len(tasks.RULES)
        assert answered.found == answered.exact_found
        # Counts and positions are paid for: 4 bytes a row of 2 * 8 numbers, and 4 a head.
        rows = 2 * 2 * LENGTH
        assert answered.bits == pytest.approx(16 + 8 * 4 * (rows + 4) / (rows * 16))

    def test_less_is_worse_and_smaller(self, model: Model, window: Window) -> None:
        context = context_of(model, window)
        answers = []
        for fraction in (0.9, 0.3, 0.05):
            kept = of_context(context, "random", rows_of(context, fraction=fraction))
            answers.append(window.selected(kept))
            size = payload_bytes(kept.shape(), kept.dtype)
            assert answers[-1].bits == pytest.approx(8 * size / window.kv.size)
        assert answers[0].kl < answers[1].kl < answers[2].kl

    def test_questions_are_asked_on_one_cache(self, window: Window) -> None:
        answered = window.coded(CODECS["int4"])
        assert len(answered.questions) == FACTS + len(tasks.RULES) == 16
        assert len(answered.found) == FACTS
        assert 0 < answered.kl < 1
        assert 4 < answered.bits < 8

    def test_the_text_goes_on_where_the_context_ends(self, model: Model, window: Window) -> None:
        """The continuation is the prose behind the context's last token, none of it in between."""
        prose = pieces(model)[0]
        tail = window.tokens[-20:]
        start = next(i for i in range(len(prose)) if prose[i : i + 20] == tail) + 20
        assert window._text == prose[start : start + CONTINUATION]
        assert window._following == prose[start + 1 : start + CONTINUATION + 1]


class TestRun:
    def test_the_whole(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "codecs", lambda name: {"int4": CODECS["int4"]})
        told: list[str] = []
        measured = run.measure(
            folder,
            "little",
            held_out_text(),
            methods=("snapkv", "evolkv"),
            length=LENGTH,
            count=2,
            fractions=(0.5, 0.25),
            tell=told.append,
        )
        assert [one.label for one in measured.rows] == ["int4", "snapkv 0.5", "snapkv 0.25"]
        assert measured.windows == 2
        assert measured.questions == 16
        assert "takes a table" in measured.left_out["evolkv"]
        coded, half, quarter = measured.rows
        assert half.bits == pytest.approx(2 * quarter.bits, rel=1e-3)
        assert half.identity == quarter.identity
        assert "context only" in half.identity
        assert coded.fraction == 1.0
        assert quarter.worst.value >= quarter.questions.value
        assert len(quarter.rules_by_place) == len(tasks.RULES)
        assert np.mean(quarter.rules_by_place) == pytest.approx(quarter.rules.value)
        assert any(line.startswith("window 2 of 2") for line in told)
        again = msgspec.json.decode(msgspec.json.encode(measured), type=Table)
        assert again == measured

    def test_lengths_that_cannot_be(self, folder: Path) -> None:
        for length, why in (
            (1000, "whole number of chunks"),
            (2048, "takes 2048 tokens, not 4096"),
        ):
            with pytest.raises(UsageError, match=why):
                run.measure(folder, "little", held_out_text(), length=length)


class TestCommand:
    def test_writes_what_it_measured(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        pytest.importorskip("matplotlib")
        import typer.main

        from kvstrata import cli

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(run, "codecs", lambda name: {"int4": CODECS["int4"]})
        few = {name: METHODS[name] for name in ("snapkv", "random")}
        monkeypatch.setattr(run, "METHODS", few)
        command = typer.main.get_command(cli.build_app())
        words = ["quality", str(folder), "--selection", "--quick", "--output", "out"]
        command.main([*words, "--json", "out.json"], standalone_mode=False)
        assert json.loads((tmp_path / "out.json").read_text())["length"] == 1024
        assert "| `snapkv`" in (tmp_path / "out" / "selection.md").read_text()
        assert (tmp_path / "out" / "selection.png").stat().st_size > 10_000
        assert not (tmp_path / "cache" / "kvstrata" / "selection").exists()
        assert "scripts/install-kvpress.sh" in capsys.readouterr().err
        for wrong in (["--selection", "--codec", "int4"], ["--kvpress", "x"]):
            with pytest.raises(UsageError, match="goes with"):
                command.main(["quality", str(folder), *wrong], standalone_mode=False)

    def test_tables_lie_under_the_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert table.path_for("abc") == Path("/somewhere/kvstrata/selection/abc.json")
