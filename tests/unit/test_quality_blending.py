"""Reuse at any position on tiny models: rows computed anew, keys turned, the table of all plans."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from tests.support.little_models import byte_pairs, little

from kvstrata import cli
from kvstrata.blend import Rule
from kvstrata.cli.blend_ways import COMPUTED_LAYERS, KEPT, TEMPERATURES, further, sparse
from kvstrata.codecs.elements import to_float32
from kvstrata.errors import UsageError
from kvstrata.quality import metrics
from kvstrata.quality.blending.forms import HEADINGS, markdown
from kvstrata.quality.blending.prompts import CONTINUATION, Prompt, prompts
from kvstrata.quality.blending.rows import Turning, deviation, recompute
from kvstrata.quality.blending.run import measure
from kvstrata.quality.blending.samples import Sample, Window
from kvstrata.quality.blending.scores import scored
from kvstrata.quality.blending.table import BlendTable, load
from kvstrata.quality.blending.ways import BOUNDS, Made, Way, ways
from kvstrata.quality.models import Model
from kvstrata.quality.run import held_out_text

PARTIAL = {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pairs()


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that what is wrong in the second one spreads."""
    folder = tmp_path_factory.mktemp("llama")
    return little("Llama", tokenizer, folder, num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return Model(llama)


@pytest.fixture(scope="module")
def prompt(model: Model) -> Prompt:
    return prompts(model, Turning(model), held_out_text(), 3, 96, 1)[0]


def kl(prompt: Prompt, kv: Any) -> float:
    """Of the text that follows."""
    window = Window(prompt)
    return float(window.sample(Way("one", 0.0, lambda *_: Made(kv, 0.0))).kl.mean())


class TestRows:
    def test_all_rows_computed_anew_are_the_exact_cache(self, model: Model, prompt: Prompt) -> None:
        nothing = prompt.exact.copy()
        nothing[:, :, :, prompt.head :] = 0
        ids = prompt.asked.ids
        kv = recompute(model, nothing, ids, range(prompt.head, len(ids)))
        assert (kv[:, :, :, : prompt.head] == prompt.exact[:, :, :, : prompt.head]).all()
        np.testing.assert_allclose(
            to_float32(kv, "bfloat16"), to_float32(prompt.exact, "bfloat16"), rtol=0.1, atol=0.03
        )
        assert kl(prompt, kv) < 1e-4 < kl(prompt, nothing)

    def test_a_row_sees_what_lies_before_it_alone(self, model: Model, prompt: Prompt) -> None:
        ids, place = prompt.asked.ids, prompt.head + 20
        kv = recompute(model, prompt.exact, ids, [place])
        behind = prompt.exact.copy()
        behind[:, :, :, place + 1 :] = 0
        assert (recompute(model, behind, ids, [place])[:, :, :, place] == kv[:, :, :, place]).all()
        before = prompt.exact.copy()
        before[:, :, :, place - 1] = 0
        other = recompute(model, before, ids, [place])
        assert (other[1:, :, :, place] != kv[1:, :, :, place]).any()
        # The others stay as they are, and so does what was handed in.
        assert (np.delete(kv, place, 3) == np.delete(prompt.exact, place, 3)).all()

    def test_no_rows_are_a_copy(self, model: Model, prompt: Prompt) -> None:
        kv = recompute(model, prompt.loaded, prompt.asked.ids, [])
        assert (kv == prompt.loaded).all()
        assert not np.shares_memory(kv, prompt.loaded)

    def test_deviation_is_of_the_second_layer(self, model: Model, prompt: Prompt) -> None:
        ids, reused = prompt.asked.ids, prompt.reused
        found = deviation(model, prompt.loaded, ids, reused)
        loaded, exact = (to_float32(kv, "bfloat16")[1] for kv in (prompt.loaded, prompt.exact))
        expected = ((loaded - exact) ** 2).sum(axis=(0, 1, 3))[prompt.head :]
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.05)
        assert deviation(model, prompt.exact, ids, reused).max() < found.min()


class TestTurning:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("Llama", {}),
            ("Llama", {"rope_parameters": YARN}),
            ("Qwen3", {}),
            ("Phi", PARTIAL),  # half of each head is not turned
            ("Glm", {**PARTIAL, "num_key_value_heads": 2}),  # neighbours are turned
            ("Cohere", {"num_key_value_heads": 2}),  # and lie side by side in its table
        ],
    )
    def test_keys_of_the_first_layer_are_those_of_the_new_position(
        self, kind: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path
    ) -> None:
        model = Model(little(kind, tokenizer, tmp_path, **options))
        ids = list(range(20, 84))
        kv = model.prefill([*range(300, 420), *ids])
        turned = Turning(model).turned(
            np.ascontiguousarray(model.prefill(ids)), np.arange(64), np.arange(120, 184)
        )
        found, expected = (
            to_float32(np.ascontiguousarray(x[0, 0]), "bfloat16")
            for x in (turned, kv[:, :, :, 120:])
        )
        # Rounded twice on one side, once on the other.
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())

    def test_what_stays_is_not_touched_and_values_never(self, model: Model) -> None:
        kv = model.prefill(range(10, 74))
        places = np.arange(64)
        turned = Turning(model).turned(kv, places, np.where(places < 32, places, places + 7))
        assert (turned[:, :, :, :32] == kv[:, :, :, :32]).all()
        assert (turned[:, 1] == kv[:, 1]).all()
        assert (turned[:, 0, :, 32:] != kv[:, 0, :, 32:]).mean() > 0.5

    def test_what_cannot_be_turned_is_refused(self, tokenizer: Any, tmp_path: Path) -> None:
        sliding = little("Mistral", tokenizer, tmp_path / "a", sliding_window=64)
        with pytest.raises(UsageError, match="not sliding_attention"):
            Turning(Model(sliding))
        learnt = little("GPTNeo", tokenizer, tmp_path / "b", attention_types=[[["global"], 2]])
        with pytest.raises(UsageError, match="no rotary embedding"):
            Turning(Model(learnt))


class TestPrompts:
    def test_documents_move_and_each_tells_its_fact(self, prompt: Prompt, tokenizer: Any) -> None:
        stored, asked = prompt.stored, prompt.asked
        assert sorted(asked.ids) == sorted(stored.ids)
        assert asked.ids[: prompt.head] == stored.ids[: prompt.head]
        for number, (was, now) in enumerate(zip(stored.places, asked.places, strict=True)):
            assert was != now
            document = [asked.ids[place] for place in now]
            assert document == [stored.ids[place] for place in was]
            told = tokenizer.decode(prompt.questions[number] + prompt.answers[number])
            assert told.strip() in tokenizer.decode(document)
        assert len(prompt.following) == CONTINUATION + 1
        assert prompt.reused[0].start == prompt.head
        assert prompt.reused[-1].stop == len(asked.ids)

    def test_what_is_loaded_is_turned_and_otherwise_as_stored(self, prompt: Prompt) -> None:
        assert (prompt.loaded[:, 1] == prompt.unturned[:, 1]).all()
        moved = prompt.loaded[:, 0, :, prompt.head :] != prompt.unturned[:, 0, :, prompt.head :]
        assert moved.mean() > 0.5
        # Values of the first layer know of no position and no other token.
        assert (prompt.loaded[0, 1] == prompt.exact[0, 1]).all()
        # What is behind another text differs, from the second layer on.
        assert (prompt.loaded[1, 1] != prompt.exact[1, 1]).mean() > 0.5


def sample(kl: float, computed: float = 0.0) -> Sample:
    return Sample(computed, np.full(4, kl), 0.0, 1.0, [0.5, 0.1], [True, False])


class TestScores:
    def test_gaps_are_shares_of_none_and_of_as_many_random_tokens(self) -> None:
        rows = scored(
            {
                Rule("none", 0.0): [sample(0.4), sample(0.2)],
                Rule("random", 0.5): [sample(0.2, 0.5), sample(0.1, 0.5)],
                Rule("edges", 0.5): [sample(0.1, 0.5), sample(0.05, 0.5)],
                # Half as many as were measured: between none and half of them, 0.3 and 0.15.
                Rule("share", 0.5): [sample(0.15, 0.25), sample(0.075, 0.25)],
                Rule("all", 1.0): [sample(0.0, 1.0), sample(0.0, 1.0)],
            },
            [[True, False], [True, True]],
        )
        none, random, edges, share, every = rows
        assert none.closed.value == pytest.approx(0)
        assert (none.over_random, random.over_random, every.over_random) == (None, None, None)
        assert edges.closed.value == pytest.approx(0.75)
        assert edges.over_random is not None
        assert edges.over_random.value == pytest.approx(0.5)
        assert share.over_random is not None
        assert share.over_random.value == pytest.approx(0.5)
        assert every.closed.value == 1
        assert edges.kl_mean.value == pytest.approx(0.075)
        assert edges.kl_p95.value == pytest.approx(0.1)
        assert edges.answer_nats.value == pytest.approx(0.3)
        # The second document's fact is found in half of the windows, so it does not count.
        assert edges.retrieval is not None
        assert edges.retrieval.value == 1
        assert edges.found == (1, 0)


@pytest.fixture(scope="module")
def table(llama: Path) -> BlendTable:
    return measure(llama, "llama", held_out_text(), documents=3, length=96, count=3)


class TestMeasure:
    def test_all_is_exact_and_not_turned_is_worst(self, table: BlendTable) -> None:
        every, none = table.row("all", 1.0), table.row("none", 0.0)
        assert every.kl_mean.value < 1e-4
        assert every.kl_mean.value < none.kl_mean.value / 100
        assert every.closed.value > 0.99
        assert table.row("unturned", 0.0).kl_mean.value > 2 * none.kl_mean.value

    def test_more_tokens_leave_less(self, table: BlendTable) -> None:
        for plan in ("random", "edges", "deviation"):
            few, many = table.row(plan, 0.05), table.row(plan, 0.5)
            assert few.computed == pytest.approx(0.05, abs=0.01)
            assert many.computed == pytest.approx(0.5, abs=0.01)
            assert many.kl_mean.value < few.kl_mean.value < table.row("none", 0.0).kl_mean.value

    def test_less_deviation_left_is_more_computed_and_less_wrong(self, table: BlendTable) -> None:
        rows = [table.row("deviation", 1.0, bound) for bound in BOUNDS]
        assert sorted(BOUNDS, reverse=True) == list(BOUNDS)
        for loose, tight in pairwise([table.row("none", 0.0), *rows]):
            assert loose.computed < tight.computed < 1
            assert tight.kl_mean.value < loose.kl_mean.value
        cells = [line for line in markdown(table).splitlines() if "| bound 0.5 |" in line]
        assert cells[0].startswith("| `deviation` | bound 0.5 |")

    def test_kv_seen_behind_other_prefixes_is_nearer_than_one_of_them(
        self, table: BlendTable
    ) -> None:
        assert table.row("anchors", 0.0).closed.value > 0.1

    def test_there_is_a_row_for_each_way(self, table: BlendTable) -> None:
        assert [row.rule for row in table.rows] == [way.rule for way in ways()]
        assert len(table.found) == table.documents == 3
        page = markdown(table)
        assert page.count(" | ".join(HEADINGS)) == 1
        assert page.count("| `edges` |") == (8 if any(table.found) else 4)

    def test_a_way_that_refuses_is_left_out_with_its_reason(self, llama: Path) -> None:
        def refuse(*_: Any) -> Made:
            raise UsageError("not with this one")

        first = [way for way in ways(()) if way.plan == "none"]
        found = measure(
            llama, "llama", held_out_text(), measured=first, documents=2, length=64, count=1,
            more=lambda model: [Way("other", 0.0, refuse)],
        )  # fmt: skip
        assert found.left_out == {"other": "not with this one"}
        assert [row.plan for row in found.rows] == ["none"]

    def test_ways_that_change_attention_or_layers(self, llama: Path) -> None:
        first = [way for way in ways(()) if way.plan == "none"]
        found = measure(
            llama, "llama", held_out_text(), measured=first, documents=3, length=96, count=2,
            more=lambda model: [
                *further(model, llama), Way("all kept", 1.0, sparse(1.0), by_question=True)
            ],
        )  # fmt: skip
        assert found.left_out == {}
        for share in COMPUTED_LAYERS:
            # Another model that is this one.
            assert found.row("droidspeak", share).kl_mean.value < 1e-4
        kept = [found.row("samkv", ratio) for ratio in KEPT]
        for ratio, row in zip(KEPT, kept, strict=True):
            # The ends of a document are kept in any case, and blocks as far as they fit.
            assert ratio - 0.1 < row.computed < ratio + 0.05
        assert found.row("all kept", 1.0).kl_mean.value < 1e-4 < kept[1].kl_mean.value
        apart = {row.kl_mean.value for row in found.rows if row.plan.startswith("ape")}
        assert len(apart) == len(TEMPERATURES)

    def test_what_cannot_be_measured_is_said(self, llama: Path) -> None:
        for options, why in (
            ({"documents": 1}, "two at least"),
            ({"documents": 3, "length": 700, "count": 1}, "takes 2048 tokens"),
            ({"documents": 2, "length": 12, "count": 1}, "too short for a fact"),
        ):
            with pytest.raises(UsageError, match=why):
                measure(llama, "llama", held_out_text(), **options)  # type: ignore[arg-type]

    def test_a_way_may_make_a_cache_for_each_question(self, prompt: Prompt) -> None:
        seen: list[list[int]] = []

        def make(prompt: Prompt, question: Any) -> Made:
            seen.append(list(question))
            return Made(prompt.exact, 0.25)

        found = Window(prompt).sample(Way("one", 0.0, make, by_question=True))
        assert seen[1:] == [prompt.questions[number] for number in prompt.asked.documents]
        assert found.kl.max() < 1e-6
        assert found.computed == 0.25
        assert np.abs(found.answer_nats).max() < 1e-4

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
        to = ["--json", str(tmp_path / "t.json"), "--output", str(tmp_path / "out")]
        command.main(["quality", str(llama), "--blend", "--quick", *to], standalone_mode=False)
        assert "deviation" in capsys.readouterr().out
        assert load(tmp_path / "t.json").row("edges", 0.15).computed > 0.1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "blend.md",
            "blend.png",
        ]
        with pytest.raises(UsageError, match="--donor goes with --blend"):
            command.main(["quality", str(llama), "--donor", str(llama)], standalone_mode=False)
        with pytest.raises(UsageError, match="--blend goes with neither"):
            command.main(["quality", str(llama), "--blend", "--speeds"], standalone_mode=False)


def test_equal_caches_give_equal_answers_wherever_they_start(model: Model) -> None:
    """A prefix that is packed, as of documents that share positions, is seen whole."""
    kv = model.prefill(range(10, 90))
    (plain,) = model.branches(kv, 1).append([[1, 2, 3]], [3])
    (same,) = model.branches(kv, 1, 80).append([[1, 2, 3]], [3])
    (nearer,) = model.branches(kv, 1, 40).append([[1, 2, 3]], [3])
    assert (plain == same).all()
    assert metrics.divergence(plain, nearer).min() > 0
    less = kv.copy()
    less[:, :, :, 60:] = 0
    (fewer,) = model.branches(less, 1, 40).append([[1, 2, 3]], [3])
    assert metrics.divergence(nearer, fewer).min() > 0
