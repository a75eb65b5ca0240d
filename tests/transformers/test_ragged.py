"""Attention to each head's own tokens: what a model computes that had never seen the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.transformers.place import greedy, load
from tests.transformers.selecting import chosen
from transformers import DynamicCache

from kvstrata.connectors.transformers import ragged
from kvstrata.connectors.transformers.ragged import NAME, answering, attend, cache_of
from kvstrata.connectors.transformers.twins import twin_of
from kvstrata.errors import Incompatible, UsageError
from kvstrata.selection.kept import Kept

CPU = torch.device("cpu")
TOKENS = 90


@pytest.fixture(scope="module")
def model() -> Any:
    return load("tiny_llama")


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return twin_of(model, NAME)


@pytest.fixture(scope="module")
def exact(model: Any) -> Any:
    """The cache of a context; not to be changed."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(TOKENS), past_key_values=cache, use_cache=True)
    return cache


def ids(count: int, first: int = 5) -> torch.Tensor:
    return (torch.arange(first, first + count)[None] * 37) % 211


def copied(cache: Any) -> DynamicCache:
    return DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])


def seen_by(model: Any, exact: Any, kept: Kept, new: torch.Tensor) -> torch.Tensor:
    """The logits of a model whose every layer masks what its heads did not keep."""
    layers, heads = kept.counts.shape
    there = np.zeros((layers, heads, TOKENS), np.bool_)
    for layer, head in np.ndindex(layers, heads):
        there[layer, head, kept.positions[kept.head(layer, head)]] = True
    count = new.shape[1]
    causal = torch.ones(count, count, dtype=torch.bool).tril().expand(heads, -1, -1)
    hooks = []
    for layer, module in enumerate(model.model.layers):
        context = torch.from_numpy(there[layer])[:, None].expand(-1, count, -1)
        mask = torch.cat([context, causal], -1)
        groups = model.config.num_attention_heads // heads
        whole = mask.repeat_interleave(groups, 0)[None]

        def masked(module: Any, args: Any, kwargs: Any, mask: torch.Tensor = whole) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(module.self_attn.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        with torch.no_grad():
            found = model(input_ids=new, past_key_values=copied(exact), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    logits: torch.Tensor = found.logits
    return logits


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("at_once", [1 << 26, 500])
def test_as_a_model_that_masks_what_was_dropped(
    fraction: float, at_once: int, model: Any, twin: Any, exact: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ragged, "MAX_MASK", at_once)
    kept = chosen(exact, TOKENS, fraction, seed=int(10 * fraction))
    assert len(set(kept.counts.ravel().tolist())) > 1
    new = ids(12, 100)
    expected = seen_by(model, exact, kept, new)
    with torch.no_grad(), answering():
        at_a_time = twin(input_ids=new, past_key_values=cache_of(kept, CPU)).logits
        cache = cache_of(kept, CPU)
        each = [twin(input_ids=new[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
    torch.testing.assert_close(at_a_time, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(each, 1), expected, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == TOKENS + 12


def test_a_head_may_keep_nothing(model: Any, twin: Any, exact: Any) -> None:
    kept = chosen(exact, TOKENS, 0.3)
    counts = kept.counts.copy()
    gone = kept.head(0, 0)
    counts[0, 0] = 0
    positions, keys, values = (
        rows[gone.stop :] for rows in (kept.positions, kept.keys, kept.values)
    )
    less = Kept(counts, positions, keys, values, kept.dtype, TOKENS)
    new = ids(4, 100)
    with torch.no_grad(), answering():
        found = twin(input_ids=new, past_key_values=cache_of(less, CPU)).logits
    torch.testing.assert_close(found, seen_by(model, exact, less, new), atol=1e-4, rtol=1e-4)


def test_fillings_are_never_looked_at(twin: Any, exact: Any) -> None:
    kept, new = chosen(exact, TOKENS, 0.2), ids(3, 100)
    caches = cache_of(kept, CPU), cache_of(kept, CPU)
    for layer in caches[1].layers:
        for head, count in enumerate(layer.counts.tolist()):
            layer.keys[0, head, count:] = 1e4
            layer.values[0, head, count:] = -1e4
    with torch.no_grad(), answering():
        one, other = (twin(input_ids=new, past_key_values=cache).logits for cache in caches)
    assert torch.equal(one, other)


def test_bits_are_those_that_were_kept(exact: Any) -> None:
    kept = chosen(exact, TOKENS, 0.4)
    cache = cache_of(kept, CPU)
    for layer, head in np.ndindex(*kept.counts.shape):
        own, count = kept.head(layer, head), int(kept.counts[layer, head])
        positions = torch.from_numpy(kept.positions[own].astype(np.int64))
        for state in ("keys", "values"):
            ours = getattr(cache.layers[layer], state)[0, head, :count]
            assert torch.equal(ours, getattr(exact.layers[layer], state)[0, head, positions])


def test_only_what_was_computed_can_be_taken_back(twin: Any, exact: Any) -> None:
    kept, new = chosen(exact, TOKENS, 0.5), ids(6, 100)
    cache = cache_of(kept, CPU)
    with torch.no_grad(), answering():
        first = twin(input_ids=new, past_key_values=cache).logits
        cache.crop(-6)
        assert cache.get_seq_length() == TOKENS
        assert torch.equal(twin(input_ids=new, past_key_values=cache).logits, first)
        cache.reset()
        assert torch.equal(twin(input_ids=new, past_key_values=cache).logits, first)
    with pytest.raises(UsageError, match="nothing can be taken back"):
        cache.crop(-7)


def test_another_attention_is_refused(model: Any, exact: Any) -> None:
    with pytest.raises(UsageError, match="goes with no model but"):
        greedy(model, ids(TOKENS + 3)[0].tolist(), 1,
               past_key_values=cache_of(chosen(exact, TOKENS, 0.5), CPU))  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"attention_mask": torch.ones(1, 1, 1, 3)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_this_attention_does_not_have_is_refused(more: dict[str, Any], says: str) -> None:
    key = torch.zeros(1, 2, 3, 8)
    arguments = {"attention_mask": None, **more}
    with pytest.raises(Incompatible, match="does not hand"):
        attend(torch.nn.Module(), torch.zeros(1, 4, 1, 8), key, key, **arguments)
    key.kvstrata_kept = (torch.tensor([2, 1]), 2)
    with pytest.raises(Incompatible, match=says):
        attend(torch.nn.Module(), torch.zeros(1, 4, 1, 8), key, key, **arguments)


def test_a_twin_has_no_weights_of_its_own(model: Any, twin: Any) -> None:
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is other
    assert model.config is not twin.config
    assert all(
        module.config is twin.config for module in twin.modules() if hasattr(module, "config")
    )
    assert model.config._attn_implementation != NAME
