"""The table of quality: its parts on numbers worked out by hand, the whole on a tiny model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer.main
from tests.support.little_models import byte_pairs, little

from kvstrata import cli
from kvstrata.codecs import CODECS
from kvstrata.codecs.base import Payload
from kvstrata.codecs.calibration import Calibration, Header, default_path
from kvstrata.codecs.elements import to_float32
from kvstrata.codecs.lossless import Lossless
from kvstrata.codecs.raw import Raw
from kvstrata.errors import CorruptObject, Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import Bytes, Elements
from kvstrata.quality import metrics, tasks
from kvstrata.quality.baselines import BASELINES
from kvstrata.quality.coding import by_chunk, chunk, speeds, through
from kvstrata.quality.corpus import english_text
from kvstrata.quality.forms import HEADINGS, markdown
from kvstrata.quality.merging import merged
from kvstrata.quality.run import choose, held_out_text, measure, measure_speeds
from kvstrata.quality.samples import Sample
from kvstrata.quality.scores import scores
from kvstrata.quality.table import (
    Estimate,
    Exact,
    Measured,
    Scores,
    Table,
    frontier,
    load,
    path_for,
    save,
)
from kvstrata.testing.codecs import kv_like

LENGTHS = (768, 1024)


@dataclass(frozen=True)
class Coarse(Raw):
    """Drops the low byte of every word; what it loses is known."""

    lossless = False

    @property
    def name(self) -> str:
        return "coarse"

    def encode_layer(self, values: Elements, layer: int, payload: Payload, out: Bytes) -> int:
        return super().encode_layer(values & np.uint16(0xFF00), layer, payload, out)


@dataclass(frozen=True)
class Lying(Coarse):
    lossless = True


@dataclass(frozen=True)
class Refusing(Raw):
    def check(self, payload: Payload) -> None:
        raise LayoutMismatch("not for this model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pairs()


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little("Llama", tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with a sliding window of 32 tokens among full ones."""
    return little(
        "Gemma3",
        tokenizer,
        tmp_path_factory.mktemp("gemma"),
        config="Gemma3TextConfig",
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def real_like(tokens: int) -> Elements:
    payload = Payload((2, 2, 1, tokens, 16), "bfloat16")
    return kv_like(payload).view(np.uint16).reshape(payload.shape)


class TestModels:
    @pytest.mark.parametrize("folder", ["llama", "gemma"])
    def test_going_on_from_a_cache_is_going_on(
        self, folder: str, tokenizer: Any, request: pytest.FixtureRequest
    ) -> None:
        import torch

        from kvstrata.quality.models import Model

        model = Model(request.getfixturevalue(folder))
        ids = tokenizer.encode(english_text()[:2000])[:200]
        kv = model.prefill(ids[:128])
        assert kv.dtype == np.uint16
        assert (model.prefill(ids[:64]) == kv[:, :, :, :64]).all()
        (found,) = model.branches(kv, 1).append([ids[128:]], [72])
        with torch.inference_mode():
            logits = model._model(torch.tensor([ids])).logits[0, 128:]
        whole = torch.log_softmax(logits, -1).numpy()
        # Apart from the rounding of the cache to bfloat16 they are the same computation.
        assert metrics.divergence(whole, found).max() < 0.01
        (other,) = model.branches(kv & np.uint16(0xFF00), 1).append([ids[128:]], [72])
        assert metrics.divergence(whole, other).mean() > metrics.divergence(whole, found).mean() * 5

    @pytest.mark.parametrize("folder", ["llama", "gemma"])
    def test_a_prompt_is_read_in_pieces(
        self, folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kvstrata.quality.models import Model

        model = Model(request.getfixturevalue(folder))
        whole = model.prefill(list(range(200)))
        monkeypatch.setattr("kvstrata.quality.models._PIECE_TOKENS", 48)
        pieces = model.prefill(list(range(200)))
        assert pieces.shape == whole.shape
        np.testing.assert_allclose(
            to_float32(pieces, "bfloat16"), to_float32(whole, "bfloat16"), rtol=0.01, atol=0.01
        )

    @pytest.mark.parametrize("folder", ["llama", "gemma"])
    def test_branches_do_not_see_each_other(
        self, folder: str, request: pytest.FixtureRequest
    ) -> None:
        from kvstrata.quality.models import Model

        model = Model(request.getfixturevalue(folder))
        kv = model.prefill(list(range(100)))
        steps = [[[1, 2, 3], [4], [5, 6]], [[7], [], [8, 9, 10]]]
        together = model.branches(kv, 3)
        first = together.append(steps[0], [2, 1, 0])
        second = together.append(steps[1], [1, 0, 3])
        assert [len(part) for part in (*first, *second)] == [2, 1, 0, 1, 0, 3]
        for branch in (0, 2):
            alone = model.branches(kv, 1)
            alone.append([steps[0][branch]], [1])
            (expected,) = alone.append([steps[1][branch]], [len(steps[1][branch])])
            np.testing.assert_allclose(second[branch], expected, atol=1e-4)

    def test_a_folder_without_a_model_is_named(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        from kvstrata.quality.models import Model

        with pytest.raises(UsageError, match="holds no causal language model"):
            Model(tmp_path)


class TestCoding:
    def test_every_whole_chunk_goes_through_and_the_rest_stays(self) -> None:
        kv = real_like(300)
        coded = through(Coarse(), kv)
        assert (coded.kv[:, :, :, :256] == kv[:, :, :, :256] & 0xFF00).all()
        assert (coded.kv[:, :, :, 256:] == kv[:, :, :, 256:]).all()
        assert len(coded.nbytes) == 2
        # Two layers, each with a length of 4 bytes in the table.
        assert coded.bits(256) == pytest.approx(16 + 8 * 8 / (kv[:, :, :, :128].size))

    def test_chunks_know_where_they_begin(self) -> None:
        payload, raw = chunk(real_like(300), 128)
        assert payload == Payload((2, 2, 1, 128, 16), "bfloat16", start=128)
        assert raw.nbytes == payload.nbytes

    def test_errors_of_keys_and_values_are_their_own(self) -> None:
        kv = real_like(256)
        kv[:, 1] &= np.uint16(0xFF00)
        coded = through(Coarse(), kv)
        assert coded.error(256, 1) == 0
        assert 0.1 < coded.error(128, 0) < 1
        assert through(Lossless(), kv).error(256, 0) == 0

    def test_chunks_may_have_any_size(self) -> None:
        kv = real_like(300)

        def drop(words: Elements, start: int) -> tuple[int, Elements]:
            assert words.shape[3] == 100
            return 1000 + start, words & np.uint16(0xFF00)

        coded = by_chunk(drop, kv, 100)
        assert coded.nbytes.tolist() == [1000, 1100, 1200]
        assert (coded.kv == kv & 0xFF00).all()
        assert coded.bits(200) == pytest.approx(8 * 2100 / kv[:, :, :, :200].size)
        assert coded.error(300, 0) == pytest.approx(through(Coarse(), kv).error(256, 0), rel=0.2)

    def test_speeds_are_measured(self) -> None:
        assert all(0 < speed < 1e6 for speed in speeds(Raw(), real_like(256)))


class TestMetrics:
    def test_divergence(self) -> None:
        exact = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
        other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
        expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
        assert metrics.divergence(exact, other) == pytest.approx([expected, 0])

    def test_loss_and_agreement(self) -> None:
        predictions = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
        assert metrics.loss(predictions, [1, 1]) == pytest.approx(-np.log(0.25 * 0.8) / 2)
        assert metrics.agreement(predictions, [0, 2]) == 0.5

    def test_an_interval_is_the_same_each_time_and_holds_the_value(self) -> None:
        values = [1.0, 2.0, 3.0, 10.0]

        def mean(drawn: Any) -> float:
            return float(np.mean(drawn))

        found = metrics.estimate(values, mean)
        assert found == metrics.estimate(values, mean)
        assert found.value == 4
        assert 1 <= found.low < 4 < found.high <= 10
        assert metrics.estimate([5.0], mean) == Estimate(5, 5, 5)


class TestTasks:
    def test_windows_are_disjoint_and_as_long_as_asked(self, tokenizer: Any) -> None:
        text = english_text()[:30_000]
        pieces = tasks.windows(tokenizer, text, 500, 4)
        assert [len(piece) for piece in pieces] == [500] * 4
        whole = tokenizer.decode(tokenizer.encode(text))
        starts = [whole.index(tokenizer.decode(piece[5:400])) for piece in pieces]
        assert sorted(set(starts)) == starts
        with pytest.raises(UsageError, match="too few for 4 windows"):
            tasks.windows(tokenizer, text[:1000], 500, 4)

    def test_a_context_holds_its_rules_and_every_fact_before_its_length(
        self, tokenizer: Any
    ) -> None:
        prose = tokenizer.encode(english_text()[:20_000])
        made = tasks.context(tokenizer, prose, LENGTHS, seed=1)
        assert len(made.ids) == max(LENGTHS)
        for length in LENGTHS:
            text = tokenizer.decode(made.ids[:length])
            facts = [fact for fact in made.facts if fact.length == length]
            assert len(facts) == tasks.DEPTHS
            places = [text.index(tokenizer.decode(fact.ids + fact.answer)) for fact in facts]
            assert places == sorted(places)
            rules = [rule for rule in made.rules if rule.length == length]
            places = [text.index(tokenizer.decode(rule.answer)) for rule in rules]
            assert places == sorted(places)
            assert len(places) == len(tasks.RULES)
        assert made == tasks.context(tokenizer, prose, LENGTHS, seed=1)
        assert made != tasks.context(tokenizer, prose, LENGTHS, seed=2)
        with pytest.raises(UsageError, match="too few"):
            tasks.context(tokenizer, prose, [256], seed=0)


def sample(length: int, exact: list[bool], found: list[bool], kl: float = 0.1) -> Sample:
    kls = np.full(4, kl)
    return Sample(length, 4.0, 0.1, 0.2, 0.05, kls, 0.75, exact, found, [1.0, 0.5], [0.0, 0.2])


class TestScores:
    def test_only_what_the_exact_cache_finds_counts(self) -> None:
        # Depth 0 is found in 4 of 5 windows, depth 1 in 3 of 5: only the first counts.
        windows = [
            [sample(512, [i > 0, i > 1], [i > 2, True]), sample(1024, [False] * 2, [True] * 2)]
            for i in range(5)
        ]
        found = scores(windows, 512).retrieval
        assert found is not None
        assert found.value == pytest.approx(2 / 4)
        assert scores(windows, 1024).retrieval is None
        both = scores(windows, 0).retrieval
        assert both is not None
        assert both.value == found.value

    def test_means_are_over_windows_and_lengths(self) -> None:
        windows = [[sample(512, [True], [True], kl), sample(1024, [True], [True], 0.3)]
                   for kl in (0.1, 0.2)]  # fmt: skip
        assert scores(windows, 512).kl_mean.value == pytest.approx(0.15)
        assert scores(windows, 0).kl_mean.value == pytest.approx(0.225)
        assert scores(windows, 0).perplexity.value == pytest.approx(np.expm1(0.05))
        assert scores(windows, 0).rules_by_place == (1.0, 0.5)


def row(name: str, bits: float, kl: float) -> Measured:
    def at(length: int) -> Scores:
        same = Estimate(kl, kl, kl)
        return Scores(
            length=length, bits=bits, key_error=0.1, value_error=0.1, perplexity=same,
            kl_mean=same, kl_p99=same, agreement=same, retrieval=None, rules=same,
            rules_nats=same, rules_by_place=(1.0, 0.9),
        )  # fmt: skip

    return Measured(
        name=name, family=name, parameters="01", lossless=not kl, encode_gbps=1.0,
        decode_gbps=2.0, scores=(at(0), at(512)),
    )  # fmt: skip


def table(*codecs: Measured) -> Table:
    return Table(
        kvstrata="0", model="m", weights="ab" * 32, text="00", windows=1, lengths=(512,),
        machine="here", codecs=codecs, left_out={"odd": "not for this model"},
        exact=(Exact(length=512, perplexity=9.0, retrieval=(1.0, 0.5), rules=0.5),),
    )  # fmt: skip


TABLE = table(row("lossless", 11, 0), row("good", 4, 0.01), row("bad", 5, 0.02), row("deep", 2, 1))


class TestTable:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        save(TABLE, tmp_path / "new" / "table.json")
        assert load(tmp_path / "new" / "table.json") == TABLE
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]

    def test_what_is_no_table_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        with pytest.raises(FileNotFoundError):
            load(path)
        good = json.loads(msgspec.json.encode(TABLE))
        broken: list[Any] = [
            {**good, "extra": 1},
            {key: value for key, value in good.items() if key != "weights"},
            {**good, "codecs": [{**good["codecs"][0], "scores": good["codecs"][0]["scores"][:1]}]},
            {**good, "lengths": [512, 1024]},
            {**good, "codecs": [json.loads(msgspec.json.encode(row("x", 0.0, 0.1)))]},
            [],
        ]
        for bad in broken:
            path.write_text(json.dumps(bad))
            with pytest.raises(CorruptObject):
                load(path)
        path.write_bytes(b"\xff{")
        with pytest.raises(CorruptObject):
            load(path)
        path.write_text(json.dumps({**good, "version": 2, "more": 1}))
        with pytest.raises(Incompatible, match="measure again"):
            load(path)

    def test_it_lies_under_the_identity_of_the_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert path_for("abc") == tmp_path / "kvstrata" / "quality" / "abc.json"

    def test_the_frontier_leaves_out_what_is_dominated(self) -> None:
        assert frontier(TABLE.codecs) == {"lossless", "good", "deep"}
        assert TABLE.codec("good").at().ratio == 4
        with pytest.raises(UsageError, match="it has lossless, good, bad, deep"):
            TABLE.codec("other")
        with pytest.raises(UsageError, match="not measured at 4096"):
            TABLE.codec("good").at(4096)

    def test_markdown_has_every_codec_and_what_was_left_out(self) -> None:
        text = markdown(TABLE)
        rows = [line for line in text.splitlines() if line.startswith("| `good` *")]
        assert len(rows) == 2
        assert all(line.count("|") == len(HEADINGS) + 1 for line in rows)
        assert "| `bad` |" in text
        assert "- `odd`: not for this model" in text

    def test_a_later_run_adds_rows_and_replaces_them(self) -> None:
        old = table(
            row("lossless", 11, 0), row("gone", 4, 1), row("good", 4, 0.01), row("kivi", 3, 1)
        )
        new = msgspec.structs.replace(
            table(row("deep", 2, 1), row("good", 3, 0.02)),
            kvstrata="1",
            left_out={"lossless": "no longer"},
        )
        order = ["raw", "lossless", "odd", "good", "deep", "kivi"]
        found = merged(old, new, order)
        assert [row.name for row in found.codecs] == ["good", "deep", "kivi", "gone"]
        assert found.codec("good").at().bits == 3
        assert found.kvstrata == "1"
        assert list(found.left_out.items()) == [
            ("lossless", "no longer"),
            ("odd", "not for this model"),
        ]
        again = merged(found, table(row("odd", 5, 1)), order)
        assert [row.name for row in again.codecs] == ["odd", "good", "deep", "kivi", "gone"]
        # `table` leaves "odd" out, and what was measured now says so itself.
        assert again.left_out["odd"] == "not for this model"
        measured = merged(
            found, msgspec.structs.replace(table(row("odd", 5, 1)), left_out={}), order
        )
        assert measured.left_out == {"lossless": "no longer"}

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("weights", "cd" * 32, "other weights"),
            ("text", "01", "another text"),
            ("lengths", (512, 1024), "other lengths"),
            ("windows", 2, "another number of windows"),
            ("machine", "there", "speeds of another machine"),
        ],
    )
    def test_rows_of_another_measurement_do_not_mix(
        self, field: str, value: Any, words: str
    ) -> None:
        other = msgspec.structs.replace(TABLE, **{field: value})
        with pytest.raises(UsageError, match=f"has {words}.*stays as it is"):
            merged(TABLE, other, [])

    def test_a_plot_is_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from kvstrata.quality.plot import plot

        plot(TABLE, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class TestWhole:
    def test_a_tiny_model_is_measured(self, llama: Path) -> None:
        told: list[str] = []
        found = measure(
            llama,
            "tiny",
            {"lossless": CODECS["lossless"], "coarse": Coarse(), "odd": Refusing()},
            held_out_text()[:20_000],
            lengths=LENGTHS,
            count=2,
            tell=told.append,
        )
        assert found.left_out == {"odd": "not for this model"}
        assert found.lengths == LENGTHS
        assert len(told) == 2 + 2 * 2
        lossless = found.codec("lossless").at()
        assert lossless.kl_mean == lossless.kl_p99 == lossless.perplexity == Estimate(0, 0, 0)
        assert lossless.agreement.value == lossless.rules.value == 1
        for length in (0, *LENGTHS):
            coarse = found.codec("coarse").at(length)
            assert 0 < coarse.kl_mean.low <= coarse.kl_mean.high < coarse.kl_p99.high
            assert coarse.agreement.value < 1
            assert coarse.bits == pytest.approx(16, rel=0.01)
            assert len(coarse.rules_by_place) == len(tasks.RULES)

    def test_what_cannot_be_measured_is_said(self, llama: Path) -> None:
        with pytest.raises(UsageError, match="whole numbers of 128"):
            measure(llama, "tiny", {}, "text", lengths=[100])
        with pytest.raises(UsageError, match="takes 2048 tokens, not 4353"):
            measure(llama, "tiny", {}, "text", lengths=[4096])
        with pytest.raises(UsageError, match="too few"):
            measure(llama, "tiny", {}, "a short text", lengths=[512])
        with pytest.raises(CorruptObject, match="called lossless"):
            measure(llama, "tiny", {"x": Lying()}, english_text()[:20_000], lengths=[768], count=1)

    def test_codecs_are_chosen_by_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without this user's calibrations
        everything = choose([], "m")
        assert "raw" not in everything
        assert {*CODECS, *BASELINES} - {"raw"} == set(everything)
        assert list(choose(["lossless", "kivi2"], "m")) == ["lossless", "kivi2"]
        with pytest.raises(UsageError, match="no codec"):
            choose(["losless"], "m")
        with pytest.raises(UsageError, match="needs a calibration"):
            choose(["kvtc-2"], "m")

    def test_a_model_has_its_own_calibrations(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        names = {}
        for model in ("m", "org/other"):
            steps = {str(level): 1.0 for level in (2, 4)}
            header = Header(
                model=model, layers=1, heads=1, dim=2, group=1, tokens=2048, steps=steps
            )
            ones = np.ones((1, 2, 2), np.float32)
            basis = np.broadcast_to(np.eye(2, dtype=np.float16), (1, 2, 1, 2, 2)).copy()
            made = Calibration(header, np.ones((1, 1)), ones, ones, basis)
            made.save(default_path(made))
            names[model] = f"kvtc-2@{made.fingerprint.hex()[:8]}"
        assert list(choose(["kvtc-2"], "m")) == [names["m"]]
        assert list(choose(["kvtc-2"], "other")) == [names["org/other"]]
        assert list(choose([names["m"]], "other")) == [names["m"]]
        assert [name for name in choose([], "m") if name.startswith("kvtc-2")] == [names["m"]]
        with pytest.raises(UsageError, match="say of which calibration"):
            choose(["kvtc-2"], "a third")

    def test_the_command_writes_what_it_measured(
        self,
        llama: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        command = typer.main.get_command(cli.build_app())
        arguments = ["quality", str(llama), "--quick", "--codec", "lossless"]
        to = ["--json", str(tmp_path / "t.json"), "--output", str(tmp_path / "out")]
        command.main([*arguments, *to], standalone_mode=False)
        assert "lossless" in capsys.readouterr().out
        assert load(tmp_path / "t.json").codec("lossless").at(1024).ratio > 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "quality.md",
            "quality.png",
        ]
        assert not (tmp_path / "cache" / "kvstrata" / "quality").exists()
        with pytest.raises(UsageError, match="there is no table"):
            command.main(["quality", str(llama), "--speeds"], standalone_mode=False)
        with pytest.raises(UsageError, match="is no folder"):
            command.main(["quality", "no-such-model"], standalone_mode=False)

    def test_the_command_puts_rows_into_the_table_that_is_there(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("kvstrata.quality.run.LENGTHS", (768,))
        monkeypatch.setattr("kvstrata.quality.run.WINDOWS", 1)
        command = typer.main.get_command(cli.build_app())

        def run(*arguments: str) -> None:
            command.main(["quality", str(llama), *arguments], standalone_mode=False)

        run("--codec", "kivi4", "--codec", "lossless")
        (path,) = (tmp_path / "kvstrata" / "quality").iterdir()
        first = load(path)
        run("--codec", "int8")
        second = load(path)
        assert [row.name for row in second.codecs] == ["lossless", "int8", "kivi4"]
        assert {second.codec(name) for name in ("lossless", "kivi4")} == set(first.codecs)
        run("--codec", "int4", "--json", str(tmp_path / "t.json"))
        assert [row.name for row in load(tmp_path / "t.json").codecs] == ["int4"]
        assert load(path) == second
        monkeypatch.setattr("kvstrata.quality.run.WINDOWS", 2)
        with pytest.raises(UsageError, match="another number of windows"):
            run("--codec", "int4")
        assert load(path) == second
        save(msgspec.structs.replace(second, machine="slow"), path)
        run("--speeds")
        assert load(path).machine == second.machine
        with pytest.raises(UsageError, match="goes with neither"):
            run("--speeds", "--quick")

    def test_speeds_are_measured_again_and_nothing_else(self, llama: Path) -> None:
        slow = {"encode_gbps": 1e-9, "decode_gbps": 1e-9}
        names = {"lossless": CODECS["lossless"], "kivi2": BASELINES["kivi2"]}
        rows = [
            msgspec.structs.replace(
                row(name, 4, 0), family=codec.family, parameters=codec.parameters().hex(), **slow
            )
            for name, codec in names.items()
        ]
        before = msgspec.structs.replace(table(*rows), machine="slow")
        found = measure_speeds(llama, before, held_out_text()[:20_000])
        assert found.machine != "slow"
        assert all(one.encode_gbps > 1e-6 and one.decode_gbps > 1e-6 for one in found.codecs)
        same = tuple(msgspec.structs.replace(one, **slow) for one in found.codecs)
        assert msgspec.structs.replace(found, machine="slow", codecs=same) == before
        with pytest.raises(UsageError, match="int4 is not what the table measured"):
            measure_speeds(llama, table(row("int4", 4, 0)), "")
