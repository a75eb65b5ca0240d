"""Reuse that changes attention or layers, on tiny models: what is exact, and what is not seen."""

# ruff: noqa: E402 -- the connector needs libraries that may be missing

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.little_models import byte_pairs, little

from kvstrata.connectors.transformers import parallel
from kvstrata.connectors.transformers.attention import NAME, scores_changed
from kvstrata.connectors.transformers.donation import accept, donate
from kvstrata.connectors.transformers.parallel import adapted, encode_apart
from kvstrata.connectors.transformers.sparse import FIRST, LAST, ends, kept_tokens, looked_at
from kvstrata.errors import Incompatible, UsageError

HEAD, ONE, TWO, ASKED = [5, 6, 7], [*range(20, 52)], [*range(60, 84)], [3, 90, 91, 92]
KINDS = ("Llama", "Qwen3", "Gemma2")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pairs()


def made(kind: str, tokenizer: Any, folder: Path, seed: int = 0, **options: Any) -> Any:
    little(kind, tokenizer, folder, seed, num_hidden_layers=3, **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made("Llama", tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def other(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made("Llama", tokenizer, tmp_path_factory.mktemp("other"), 1)


def logits(model: Any, ids: list[int], **more: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids]), **more).logits[0]


def layers(model: Any, ids: list[int]) -> list[tuple[Any, Any]]:
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


class TestAttention:
    @pytest.mark.parametrize("kind", KINDS)
    def test_unchanged_scores_are_the_models_own_attention(
        self, kind: str, tokenizer: Any, tmp_path: Path
    ) -> None:
        options = {"sliding_window": 16} if kind == "Gemma2" else {}
        model = made(kind, tokenizer, tmp_path, **options)
        ids = HEAD + ONE
        # The one that has all of a model: Gemma 2's scores are capped, which others leave out.
        model.set_attn_implementation("eager")
        plain, before = logits(model, ids), model.config._attn_implementation
        with scores_changed(model, lambda layer, scores: scores):
            assert model.config._attn_implementation == NAME
            torch.testing.assert_close(logits(model, ids), plain, atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == before
        assert (logits(model, ids) == plain).all()

    def test_every_layer_is_asked_and_its_scores_count(self, llama: Any) -> None:
        seen = []

        def first_alone(layer: int, scores: Any) -> Any:
            seen.append((layer, tuple(scores.shape)))
            kept = torch.full_like(scores, float("-inf"))
            kept[..., 0] = scores[..., 0]
            return kept

        with scores_changed(llama, first_alone):
            found = logits(llama, HEAD + ONE)
        assert seen == [(layer, (1, 4, 35, 35)) for layer in range(3)]
        # Where only the first token is looked at, no other one matters.
        with scores_changed(llama, first_alone):
            elsewhere = logits(llama, [*HEAD[:1], *TWO[:10], ONE[-1]])
        torch.testing.assert_close(elsewhere[-1], found[-1], atol=1e-4, rtol=1e-4)

    def test_no_other_model_is_touched_and_not_twice(self, llama: Any, other: Any) -> None:
        plain = logits(other, ONE)

        def fail(layer: int, scores: Any) -> Any:
            raise AssertionError("not this one")

        with scores_changed(llama, fail):
            assert (logits(other, ONE) == plain).all()
            with (
                pytest.raises(Incompatible, match="changed already"),
                scores_changed(llama, fail),
            ):
                pass
            with pytest.raises(AssertionError, match="not this one"):
                logits(llama, ONE)
        logits(llama, ONE)


class TestParallel:
    def test_one_document_is_a_plain_prompt(self, llama: Any) -> None:
        encoded = encode_apart(llama, HEAD, [ONE])
        ids = [*encoded.ids, *ASKED]
        assert encoded.ids == HEAD + ONE
        assert encoded.start == len(HEAD + ONE)
        plain = llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        context = range(len(HEAD), len(encoded.ids))
        with adapted(llama, context, 1.0, 1.0):
            found = llama.generate(
                torch.tensor([ids]),
                past_key_values=encoded.cache(),
                position_ids=encoded.positions(len(ASKED)),
                max_new_tokens=6,
                do_sample=False,
            )
        assert found.tolist() == plain.tolist()

    def test_documents_do_not_see_each_other(self, llama: Any) -> None:
        both, swapped = encode_apart(llama, HEAD, [ONE, TWO]), encode_apart(llama, HEAD, [TWO, ONE])
        first, end = len(HEAD), len(HEAD + ONE)
        assert both.start == swapped.start == end
        for here, there in zip(both.layers, swapped.layers, strict=True):
            for ours, theirs in zip(here, there, strict=True):
                assert (ours[:, :, first:end] == theirs[:, :, first + len(TWO) :]).all()
                assert (ours[:, :, end:] == theirs[:, :, first : first + len(TWO)]).all()

    def test_an_answer_reads_all_documents_from_behind_the_longest(self, llama: Any) -> None:
        encoded = encode_apart(llama, HEAD, [ONE, TWO])
        assert encoded.positions(3)[0, -3:].tolist() == [35, 36, 37]

        def answer(cache: Any) -> Any:
            positions = encoded.positions(len(ASKED))[:, -len(ASKED) :]
            return logits(llama, ASKED, past_key_values=cache, position_ids=positions)

        found = answer(encoded.cache())
        assert (answer(encoded.cache()) == found).all()
        for place in (len(HEAD), len(encoded.ids) - 1):
            changed = encoded.cache()
            changed.layers[1].values[:, :, place] += 1
            assert (answer(changed) != found).any()

    def test_generate_goes_on_from_behind_the_longest(self, llama: Any) -> None:
        encoded = encode_apart(llama, HEAD, [ONE, TWO])
        found = llama.generate(
            torch.tensor([[*encoded.ids, *ASKED]]),
            past_key_values=encoded.cache(),
            position_ids=encoded.positions(len(ASKED)),
            max_new_tokens=5,
            do_sample=False,
        )[0].tolist()
        cache, read, place = encoded.cache(), list(ASKED), encoded.start
        for token in found[-5:]:
            positions = torch.arange(place, place + len(read))[None]
            scores = logits(llama, read, past_key_values=cache, position_ids=positions)
            assert int(scores[-1].argmax()) == token
            place, read = place + len(read), [token]

    def test_weights_are_two_softmaxes_that_compete_by_their_sums(
        self, llama: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[Any] = []
        monkeypatch.setattr(
            parallel, "scores_changed", lambda model, change: _taking(taken, change)
        )
        with adapted(llama, range(3, 8), 0.7, 0.6):
            pass
        scores = torch.randn(1, 4, 2, 12)
        scores[0, :, 0, 6:] = float("-inf")
        weights = taken[0](0, scores).softmax(-1)
        inside = scores[..., 3:8] / 0.7
        outside = torch.cat([scores[..., :3], scores[..., 8:]], -1)
        sums = torch.stack([0.6 * inside.logsumexp(-1), outside.logsumexp(-1)], -1).softmax(-1)
        torch.testing.assert_close(weights[..., 3:8], inside.softmax(-1) * sums[..., :1])
        torch.testing.assert_close(weights[..., :3], outside.softmax(-1)[..., :3] * sums[..., 1:])
        # A row that sees no document stays as it is.
        scores[..., 3:8] = float("-inf")
        torch.testing.assert_close(taken[0](0, scores).softmax(-1), scores.softmax(-1))

    def test_what_makes_no_sense_is_refused(self, llama: Any) -> None:
        for head, documents in (([], [ONE]), (HEAD, []), (HEAD, [ONE, []])):
            with pytest.raises(UsageError, match="behind a head"):
                encode_apart(llama, head, documents)
        with pytest.raises(UsageError, match="above 0"), adapted(llama, range(1), 0.0, 1.0):
            pass


class _taking:
    def __init__(self, taken: list[Any], change: Any) -> None:
        taken.append(change)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class TestDonation:
    @pytest.mark.parametrize("taken", [0, 1, 2, 3])
    def test_ones_own_layers_are_ones_own_cache(self, taken: int, llama: Any) -> None:
        cache = accept(llama, donate(llama, HEAD + ONE, 2, taken)[1])
        for layer, (keys, values) in zip(cache.layers, layers(llama, HEAD + ONE), strict=True):
            torch.testing.assert_close(layer.keys, keys)
            torch.testing.assert_close(layer.values, values)

    def test_lower_layers_are_the_others_and_upper_ones_are_computed(
        self, llama: Any, other: Any
    ) -> None:
        ids = HEAD + ONE
        cache = accept(llama, donate(other, ids, 1)[0])
        theirs, ours = layers(other, ids), layers(llama, ids)
        assert (cache.layers[0].keys == theirs[0][0]).all()
        assert (cache.layers[0].values == theirs[0][1]).all()
        for upper in (1, 2):
            assert (cache.layers[upper].values != theirs[upper][1]).any()
            assert (cache.layers[upper].values != ours[upper][1]).any()
        # The second layer is this model's, of what the other one's first made.
        hidden = donate(other, ids, 1)[0].hidden
        layer = llama.model.layers[1]
        values = layer.self_attn.v_proj(layer.input_layernorm(hidden))
        torch.testing.assert_close(
            cache.layers[1].values.transpose(1, 2).flatten(2), values.detach()
        )

    def test_what_does_not_fit_is_refused(self, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
        wide = made("Llama", tokenizer, tmp_path, hidden_size=64)
        with pytest.raises(Incompatible, match="another size"):
            accept(llama, *donate(wide, ONE, 1))
        with pytest.raises(Incompatible, match="4 layers of 3"):
            donate(llama, ONE, 4)


class TestSparse:
    def test_ends_are_of_each_document(self) -> None:
        assert ends([range(2, 12), range(20, 60)]) == [
            *range(2, 12), *range(20, 20 + FIRST), *range(60 - LAST, 60)
        ]  # fmt: skip

    def test_the_blocks_that_are_looked_at_most_are_kept(self) -> None:
        documents = [range(4, 44), range(44, 84)]
        weights = torch.zeros(84)
        weights[60:68] = 1
        weights[12:20] = 0.5
        always = set(ends(documents))
        assert set(kept_tokens(weights, 4, documents, 0.0)) == always
        assert set(kept_tokens(weights, 4, documents, 0.5)) - always == {*range(60, 68)}
        more = kept_tokens(weights, 4, documents, 0.6)
        assert set(more) - always == {*range(60, 68), *range(12, 20)}
        assert more == sorted(more)
        assert kept_tokens(weights, 4, documents, 1.0) == list(range(4, 84))

    def test_a_question_looks_at_all_and_takes_along_what_it_may_know(self, llama: Any) -> None:
        prompt = HEAD + ONE + TWO
        documents = [range(3, 35), range(35, 59)]
        there = layers(llama, prompt)

        def looked(change: int | None = None, state: int = 1) -> Any:
            changed = [(keys.clone(), values.clone()) for keys, values in there]
            if change is not None:
                changed[0][state][:, :, change] += 3
            return looked_at(llama, changed, len(HEAD), documents, ASKED)

        plain = looked()
        assert plain.shape == (59,)
        assert 0 < float(plain.min()) < float(plain.sum()) <= 1.0001
        hidden, known = documents[0][FIRST + 2], documents[0][1]
        # What is read of a token that is not known changes nothing; how it is looked at does.
        torch.testing.assert_close(looked(hidden), plain)
        assert (looked(known) != plain).any()
        assert float(looked(hidden, 0)[hidden]) != float(plain[hidden])
