"""Selection of tokens: each part on numbers worked out by hand, every method on a tiny model."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvstrata.errors import UsageError  # noqa: E402
from kvstrata.selection.aggregation import QUERIES, Aggregation  # noqa: E402
from kvstrata.selection.budgets import (  # noqa: E402
    ByLayer,
    ByProfile,
    Even,
    FromTable,
    FullHeads,
    Pyramid,
    Ranked,
    shared_out,
)
from kvstrata.selection.evidence import (  # noqa: E402
    Again,
    Ahead,
    Context,
    Lookahead,
    Whole,
    Window,
    _Gathered,
)
from kvstrata.selection.kept import payload_bytes  # noqa: E402
from kvstrata.selection.masked import masked, spread_out  # noqa: E402
from kvstrata.selection.measures import LAYERS  # noqa: E402
from kvstrata.selection.merging import IntoNearest  # noqa: E402
from kvstrata.selection.methods import METHODS, NOT_COMPOSED, method_named  # noqa: E402
from kvstrata.selection.observing import cache_of, observed, probabilities  # noqa: E402
from kvstrata.selection.observing import read as reading  # noqa: E402
from kvstrata.selection.scores import Attention  # noqa: E402
from kvstrata.selection.select import of_context, rows_of, select  # noqa: E402
from kvstrata.selection.wording import parts_of  # noqa: E402

TOKENS = 200


def tiny(**more: Any) -> Any:
    """Two layers, four heads of queries and two of keys, random weights, always the same."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def ids_of(model: Any, count: int = TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    ids: list[int] = torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
    return ids


def read(model: Any, ids: list[int], **more: Any) -> Any:
    cache = DynamicCache()
    with torch.inference_mode():
        return cache, model(torch.tensor([ids]), past_key_values=cache, **more)


@pytest.fixture(scope="module")
def context(model: Any) -> Context:
    ids = ids_of(model)
    return Context.of(model, read(model, ids)[0], ids, table=torch.tensor([3.0, 1.0]))


def with_rows(context: Context, rows: list[Any], **more: Any) -> Context:
    """The same context, as if its last tokens' attention were these rows."""
    other = replace(context, **more)
    other._rows = {Window(): rows}
    return other


class TestObserving:
    def test_attention_is_what_the_model_computes(self, model: Any) -> None:
        ids = ids_of(model, 40)
        eager = tiny(attn_implementation="eager")
        cache, output = read(eager, ids, output_attentions=True)
        context = Context.of(model, cache, ids)
        for layer, exact in enumerate(output.attentions):
            seen = context.attention(Window(8))[layer]
            torch.testing.assert_close(seen, exact[0, :, -8:], rtol=1e-4, atol=1e-5)
            # Windows of a whole context are means of the same.
            whole = context.attention(Whole(windows=10))[layer]
            means = exact[0].reshape(whole.shape[0], 10, 4, 40).mean(2)
            torch.testing.assert_close(whole, means, rtol=1e-4, atol=1e-5)

    def test_pieces_of_a_context_are_read_as_one(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = ids_of(model, 60)
        cache, _ = read(model, ids)
        at_once = Context.of(model, cache, ids).attention(Whole(windows=7))
        monkeypatch.setattr("kvstrata.selection.evidence._PIECE_TOKENS", 16)
        in_pieces = Context.of(model, cache, ids).attention(Whole(windows=7))
        for one, other in zip(at_once, in_pieces, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_the_model_and_the_cache_stay_as_they_were(self, model: Any) -> None:
        ids = ids_of(model, 40)
        cache, before = read(model, ids)
        keys = cache.layers[0].keys.clone()
        implementation = model.config._attn_implementation
        select(model, cache, ids, "kvzip", fraction=0.5)
        assert model.config._attn_implementation == implementation
        assert torch.equal(cache.layers[0].keys, keys)
        assert cache.get_seq_length() == 40
        assert torch.equal(read(model, ids)[1].logits, before.logits)

    def test_later_tokens_are_not_seen(self) -> None:
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(2, 3, 4, generator=generator)
        keys = torch.randn(1, 5, 4, generator=generator)
        rows = probabilities(queries, keys, 0.5)
        assert rows[:, 0, 3:].eq(0).all()
        assert rows[:, 1, 4:].eq(0).all()
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3))

    def test_pseudo_queries_stand_behind_the_context(self, context: Context) -> None:
        for source in (Lookahead(3), Ahead(5), Again(windows=4)):
            for rows in context.attention(source):
                assert rows.shape[2] == TOKENS
                # Nothing is hidden from them, the context's last token neither.
                assert rows[..., -1].gt(0).all()
        assert context.attention(Lookahead(3))[0].shape[1] == 3
        assert context.attention(Ahead(5))[0].shape[1] == 5

    def test_noise_cools_down_over_the_context(
        self, context: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Where the random number is 1/e the noise is 0, and the temperature alone is left.
        monkeypatch.setattr(torch, "rand", lambda *shape, **rest: torch.full(shape, math.exp(-1)))
        gathered = _Gathered(context, rows=TOKENS, of=TOKENS, noise=True)
        keys = torch.zeros(2, TOKENS, 16)
        keys[:, 0] = 1.0
        for seen, temperature in ((0, 1.0), (TOKENS // 2, 1.5)):
            gathered._seen = seen
            gathered._hear(0, torch.ones(4, 1, 16), keys, 0.25)
            row = gathered._totals[0][0, seen]
            assert float(row[0] / row[1]) == pytest.approx(math.exp(4 / temperature), rel=1e-4)
        monkeypatch.undo()
        noisy, plain = (context.attention(Whole(noise=noise))[0] for noise in (True, False))
        assert not torch.allclose(noisy, plain, atol=1e-3)

    def test_kinds_of_models_that_are_refused(self, model: Any) -> None:
        ids = ids_of(model, 20)
        cache, _ = read(model, ids)
        for field, value in (("sliding_window", 8), ("attn_logit_softcapping", 50.0)):
            setattr(model.config, field, value)
            try:
                with pytest.raises(UsageError, match=field):
                    Context.of(model, cache, ids)
            finally:
                delattr(model.config, field)
        with pytest.raises(UsageError, match="all 21 tokens"):
            Context.of(model, cache, [*ids, 1])


class TestBudgets:
    @pytest.mark.parametrize("total", [12, 13, 40, 59, 60])
    def test_shares_are_whole_within_bounds_and_add_up(self, total: int) -> None:
        weights = torch.tensor([[0.0, 1.0], [5.0, 100.0], [1e-9, 3.0]])
        counts = shared_out(weights, total, 2, 10)
        assert int(counts.sum()) == total
        assert int(counts.min()) >= 2
        assert int(counts.max()) <= 10

    def test_shares_are_proportional(self) -> None:
        assert shared_out(torch.tensor([1.0, 2.0, 3.0]), 60, 0, 100).tolist() == [10, 20, 30]
        # Who is full leaves the rest to the others, in their proportion.
        assert shared_out(torch.tensor([1.0, 2.0, 97.0]), 60, 0, 30).tolist() == [10, 20, 30]

    def test_a_pyramid_falls(self, context: Context) -> None:
        counts = Pyramid().counts(context, scores(context), 200, 1)
        assert counts[0, 0] > 10 * counts[-1, 0]

    def test_ranked_follows_the_highest_scores(self, context: Context) -> None:
        high = [torch.zeros(context.heads, TOKENS) for _ in context.layers]
        high[1][1, :50] = 1.0
        counts = Ranked(safeguard=0.0).counts(context, high, 100, 1)
        assert counts[1, 1] >= 49
        assert counts[0].sum() == counts[1].sum() == 50
        counts = Ranked(across="model", safeguard=0.5).counts(context, high, 100, 1)
        # 12 each in any case; what is left goes where the scores are.
        assert counts.min() >= 12
        assert counts[1, 1] == counts.max()
        by_layer = Ranked(across="model", unit="layer", safeguard=0.0)
        counts = by_layer.counts(context, high, 60, 1)
        assert counts.tolist() == [[6, 6], [24, 24]]

    def test_aligned_heads_rank_places(self, context: Context) -> None:
        # The heads of layer 1 care for other tokens, yet as many and as much.
        high = [torch.zeros(context.heads, TOKENS) for _ in context.layers]
        high[1][0, :30] = 1.0
        high[1][1, 60:90] = 1.0
        aligned = Ranked(across="model", aligned=True, safeguard=0.0)
        counts = aligned.counts(context, high, 60, 1)
        assert counts[1].tolist() == [29, 29]

    @pytest.mark.parametrize("measure", sorted(LAYERS))
    def test_measures_of_layers(self, context: Context, measure: str) -> None:
        """Where attention is spread and shifts, more is needed than where it lies on one token."""
        heads, rows = 4, 8
        narrow = torch.full((heads, rows, TOKENS), 1e-9)
        narrow[:, :, 0] = 1.0
        generator = torch.Generator().manual_seed(0)
        wide = torch.rand(heads, rows, TOKENS, generator=generator)
        wide /= wide.sum(-1, keepdim=True)
        told = with_rows(context, [narrow, wide])
        counts = ByLayer(measure).counts(told, scores(context), 200, 1)
        assert counts[1, 0] > counts[0, 0]
        assert counts.sum() == 200

    def test_profiles_and_full_heads(self, context: Context) -> None:
        profile = torch.zeros(2, 4)
        profile[1, 3] = 1.0
        told = replace(context, profile=profile)
        counts = ByProfile(beta=2.0).counts(told, scores(context), 200, 1)
        assert counts.tolist() == [[25, 25], [25, 125]]
        counts = FullHeads(local=0.2).counts(told, scores(context), 260, 1)
        # 13 each, and what is left makes the head that retrieves whole, then the first.
        assert counts.tolist() == [[34, 13], [13, 200]]

    def test_tables(self, context: Context) -> None:
        counts = FromTable().counts(context, scores(context), 80, 0)
        assert counts.tolist() == [[30, 30], [10, 10]]
        with pytest.raises(UsageError, match="takes a table"):
            FromTable().counts(replace(context, table=None), scores(context), 80, 0)
        with pytest.raises(UsageError, match="takes a table"):
            FromTable().counts(replace(context, table=torch.ones(3)), scores(context), 80, 0)


def scores(context: Context) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(context.heads, TOKENS, generator=generator) for _ in context.layers]


class TestAggregation:
    def test_over_queries(self) -> None:
        rows = torch.tensor([[[0.8, 0.1, 0.1, 0.0], [0.0, 0.1, 0.1, 0.8]]])
        assert QUERIES["mean"](rows)[0].tolist() == pytest.approx([0.4, 0.1, 0.1, 0.4])
        assert QUERIES["max"](rows)[0].tolist() == pytest.approx([0.8, 0.1, 0.1, 0.8])
        shifting = QUERIES["shifting"](rows)[0]
        assert shifting[0] > shifting[1]
        assert shifting[1] == pytest.approx(0.1)
        defensive = QUERIES["defensive"](rows)[0]
        # Half of the head's mean risk (0.45), half its own mean: not as little as it was seen.
        assert defensive.tolist() == pytest.approx([0.8, 0.275, 0.275, 0.8])

    def test_over_heads_and_tokens(self, context: Context) -> None:
        rows = torch.zeros(4, 1, TOKENS)
        rows[1, 0, 50] = 1.0
        rows[2, 0, 80] = 1.0
        profile = torch.zeros(2, 4)
        told = with_rows(context, [rows, rows * 2], profile=profile)
        score = Attention(Window())

        def first(**parts: Any) -> Any:
            return Aggregation(**parts).scores(told, score)[0]

        assert first()[0, 50] == 0.5
        assert first(groups="max")[0, 50] == 1.0
        assert first()[1, 50] == 0
        assert first(heads="layer")[1, 50] == 0.25
        assert first(pool=3)[0, 49:52].tolist() == [0.5] * 3
        assert first(pool=3)[0, 52] == 0
        assert first(runs=10)[0, 50:60].tolist() == pytest.approx([0.05] * 10)
        shared = Aggregation(layers=2).scores(told, score)
        assert torch.equal(shared[0], shared[1])
        assert not torch.equal(*Aggregation().scores(told, score))

    def test_retrieval_heads_decide_for_their_layer(
        self, context: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstrata.selection.aggregation._RETRIEVAL_HEADS", 1)
        rows = torch.zeros(4, 1, TOKENS)
        rows[1, 0, 50] = 1.0
        profile = torch.zeros(2, 4)
        profile[0, 1] = 1.0
        told = with_rows(context, [rows, rows], profile=profile)
        both = Aggregation(heads="retrieval").scores(told, Attention(Window()))
        assert both[0][:, 50].tolist() == [1.0, 1.0]
        assert both[1][:, 50].tolist() == [0.0, 0.0]


class TestMerging:
    def test_only_what_is_alike_is_merged(self) -> None:
        keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.1, -1.0]])
        values = torch.tensor([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0], [9.0, 9.0]])
        kept = torch.tensor([0, 1])
        new_keys, new_values = IntoNearest().merged(keys, values, kept)
        # Token 2 is exactly like token 0 and counts as much; token 3 is like neither.
        assert new_keys[0].tolist() == pytest.approx([1.5, 0.0])
        assert new_values.tolist() == [pytest.approx([3.0, 3.0]), [2.0, 2.0]]
        _, everything = IntoNearest(weighted=False).merged(keys, values, kept)
        assert everything[0].tolist() == pytest.approx([5.0, 5.0])

    def test_nothing_to_merge(self) -> None:
        keys = torch.arange(6.0).reshape(3, 2)
        same, _ = IntoNearest().merged(keys, keys, torch.arange(3))
        assert torch.equal(same, keys)


class TestSelect:
    @pytest.mark.parametrize("name", sorted(METHODS))
    @pytest.mark.parametrize("fraction", [0.1, 0.37, 1.0])
    def test_every_method_keeps_its_budget(
        self, context: Context, name: str, fraction: float
    ) -> None:
        rows = rows_of(context, fraction=fraction)
        kept = of_context(context, name, rows)
        assert kept.rows == rows == int(fraction * 2 * 2 * TOKENS)
        assert kept.prompt_tokens == TOKENS
        assert kept.counts.shape == (2, 2)
        assert kept.counts.min() >= 1
        again = of_context(replace(context, _rows={}), name, rows)
        assert kept.equals(again)
        if fraction == 1:
            # Everything is kept, so that nothing is merged: the cache itself.
            dense, there = spread_out(kept)
            assert there.all()
            exact = torch.stack([torch.stack(states) for states in context.layers])
            assert np.array_equal(dense.view(np.float32), exact.numpy())

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_what_is_kept_in_any_case(self, context: Context, name: str) -> None:
        method = METHODS[name]
        kept = of_context(context, method, rows_of(context, fraction=0.5))
        must = {*range(method.sinks), *range(TOKENS - method.recent, TOKENS)}
        for layer, head in np.ndindex(2, 2):
            assert must <= set(kept.positions[kept.head(layer, head)].tolist())

    def test_rows_are_those_of_the_cache(self, context: Context) -> None:
        kept = of_context(context, "snapkv", rows_of(context, fraction=0.3))
        keys, values = context.layers[1]
        rows = kept.head(1, 1)
        places = torch.from_numpy(kept.positions[rows].astype(np.int64))
        assert np.array_equal(kept.keys[rows].view(np.float32), keys[1, places].numpy())
        assert np.array_equal(kept.values[rows].view(np.float32), values[1, places].numpy())

    def test_merging_changes_rows_not_places(self, context: Context) -> None:
        rows = rows_of(context, fraction=0.5)
        merged = of_context(context, "d2o", rows)
        plain = of_context(context, replace(METHODS["d2o"], merging=None), rows)
        assert np.array_equal(merged.positions, plain.positions)
        assert not np.array_equal(merged.values, plain.values)

    @pytest.mark.parametrize("name", ["kvzip", "d2o", "headkv", "laq", "taskkv"])
    def test_models_that_compute_in_half(self, name: str) -> None:
        half = tiny().to(torch.bfloat16)
        ids = ids_of(half, 80)
        cache, _ = read(half, ids)
        kept = select(half, cache, ids, name, fraction=0.5)
        assert kept.dtype == "bfloat16"
        assert kept.keys.dtype == np.uint16
        assert kept.rows == 160
        if METHODS[name].merging is None:
            places = torch.from_numpy(kept.positions[kept.head(0, 0)].astype(np.int64))
            words = cache.layers[0].keys[0, 0, places].view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(kept.keys[kept.head(0, 0)], words)

    def test_bytes_are_a_bound(self, model: Any, context: Context) -> None:
        cache, _ = read(model, list(context.tokens))
        for nbytes in (10_000, 10_001, 77_777):
            kept = select(model, cache, context.tokens, "snapkv", nbytes=nbytes)
            size = payload_bytes(kept.shape(), kept.dtype)
            row = 4 + 2 * kept.keys.shape[1] * 4
            assert nbytes - row < size <= nbytes

    def test_budgets_that_cannot_be(self, model: Any, context: Context) -> None:
        with pytest.raises(UsageError, match="one of both"):
            rows_of(context)
        with pytest.raises(UsageError, match="one of both"):
            rows_of(context, fraction=0.5, nbytes=9)
        for fraction in (0.0, 1.1, -1.0):
            with pytest.raises(UsageError, match="above 0"):
                rows_of(context, fraction=fraction)
        with pytest.raises(UsageError, match="4 heads"):
            rows_of(context, fraction=0.001)
        with pytest.raises(UsageError, match="4 heads"):
            rows_of(context, nbytes=10)
        with pytest.raises(UsageError, match="no method 'none'"):
            method_named("none")

    def test_chance_is_no_head_s_choice_of_another(self, context: Context) -> None:
        kept = of_context(context, "random", rows_of(context, fraction=0.5))
        first, second = (kept.positions[kept.head(0, head)] for head in (0, 1))
        assert not np.array_equal(first, second)

    def test_identities_tell_methods_apart(self) -> None:
        identities = {method.identity() for method in METHODS.values()}
        assert len(identities) == len(METHODS)
        other = replace(METHODS["snapkv"], score=Attention(Window(16)))
        assert other.identity() != METHODS["snapkv"].identity()
        assert not set(NOT_COMPOSED) & {method.title for method in METHODS.values()}

    def test_every_row_of_a_paper_says_where_it_differs(self) -> None:
        for method in METHODS.values():
            assert method.differs, method.name


NEEDLE = 70


@pytest.fixture(scope="module")
def planted(context: Context) -> Context:
    """The same context, but one key is what the last tokens' queries are looking for."""
    found: list[Any] = []

    def hear(layer: int, queries: Any, keys: Any, scaling: float) -> None:
        found.append(queries.reshape(keys.shape[0], -1, *queries.shape[1:]).mean((1, 2)))

    with observed(context.model, hear):
        cache = cache_of(context.layers, TOKENS - 32, torch.float32)
        reading(context.model, cache, context.tokens[-32:], TOKENS - 32)
    layers = []
    for (keys, values), wanted in zip(context.layers, found, strict=True):
        keys = keys.clone()
        keys[:, NEEDLE] = 2000 * torch.nn.functional.normalize(wanted, dim=-1)
        layers.append((keys, values))
    return replace(context, layers=layers, _rows={})


class TestNeedle:
    """A token that the last ones look at is kept by whoever looks at attention."""

    @pytest.mark.parametrize(
        "name", ["snapkv", "adakv", "pyramidkv", "cake", "defensivekv", "headkv", "vatp", "mixkv"]
    )
    def test_kept_by_attention(self, planted: Context, name: str) -> None:
        assert self.found(planted, name) == 1.0

    @pytest.mark.parametrize("name", ["streaming", "random"])
    def test_and_by_no_other(self, planted: Context, name: str) -> None:
        assert self.found(planted, name) < 0.5

    def found(self, planted: Context, name: str) -> float:
        kept = of_context(planted, name, rows_of(planted, fraction=0.3))
        _, there = spread_out(kept)
        # Queries of the first layer are not changed by what was planted in it.
        return float(there[0, :, NEEDLE].mean())


class TestMasked:
    def test_equals_a_model_that_never_had_the_rest(self, model: Any, context: Context) -> None:
        """Of one head and one layer the answer can be worked out; of all kept it is the exact."""
        ids = list(context.tokens)
        new = [5, 6, 7]
        mask = torch.ones(1, 1, 3, TOKENS + 3, dtype=torch.bool)
        mask[0, 0, :, TOKENS:] = torch.ones(3, 3).tril().bool()

        def answer(kept: Any) -> Any:
            cache, _ = read(model, ids)
            positions = torch.arange(TOKENS, TOKENS + 3)[None]
            with torch.inference_mode(), masked(model, kept):
                return model(
                    torch.tensor([new]),
                    past_key_values=cache,
                    position_ids=positions,
                    attention_mask=mask,
                ).logits

        everything = np.ones((2, 2, TOKENS), np.bool_)
        cache, _ = read(model, ids)
        with torch.inference_mode():
            exact = model(torch.tensor([new]), past_key_values=cache).logits
        torch.testing.assert_close(answer(everything), exact, rtol=1e-4, atol=1e-4)
        # Tokens that all heads drop are as if the mask hid them.
        some = everything.copy()
        some[:, :, 10:150] = False
        cache, _ = read(model, ids)
        hidden = mask.clone()
        hidden[..., 10:150] = False
        with torch.inference_mode():
            reference = model(
                torch.tensor([new]),
                past_key_values=cache,
                position_ids=torch.arange(TOKENS, TOKENS + 3)[None],
                attention_mask=hidden,
            ).logits
        torch.testing.assert_close(answer(some), reference, rtol=1e-4, atol=1e-4)
        # And one head alone makes a difference.
        one = everything.copy()
        one[1, 1, 10:150] = False
        assert not torch.allclose(answer(one), exact, atol=1e-4)


def test_even_is_even(context: Context) -> None:
    assert Even().counts(context, scores(context), 82, 1).tolist() == [[21, 21], [20, 20]]


def test_the_page_has_every_method() -> None:
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("methods", root / "scripts/generate_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(text), "stale: run scripts/generate_methods.py"
    assert all(f"| `{name}` |" in text for name in METHODS)


def test_parts_in_words() -> None:
    score, budget, together = parts_of(METHODS["keyformer"])
    assert (score, budget, together) == ("Attention of Whole 64 noise", "Even", "recent 64")
    assert parts_of(METHODS["meda"])[2] == "merges IntoNearest weighted False, recent 32"
