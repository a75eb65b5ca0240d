"""Which model it is: what is refused, what is found out of a change, and who shares with whom."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.plain import Texts
from tests.transformers.place import Place, eventually, greedy, load
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from kvstrata.connectors.transformers import attach, detach
from kvstrata.errors import ConfigError, Incompatible, LayoutMismatch, UsageError
from kvstrata.testing.models import tiny_llama

NEW = 6


class Doubled(torch.nn.Module):
    """As an adapter puts itself in the place of a layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden) * 2
        return out


def small(**more: Any) -> Any:
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2, **more}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def growing() -> Any:
    return small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def encoder_and_decoder() -> Any:
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def hooked() -> Any:
    model = small()
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


def from_both_ends() -> Any:
    config = Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=16,
                              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                              use_bidirectional_attention=True)  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


REFUSED: dict[str, Callable[[], Any]] = {
    "values of": lambda: load("tiny_deepseek"),
    "LinearAttentionLayer": lambda: load("tiny_qwen3_next"),
    "rotary embedding": growing,
    "prompt of tokens alone": encoder_and_decoder,
    "hooks on a LlamaDecoderLayer": hooked,
    "no model of transformers": lambda: torch.nn.Sequential(small()),
    "what follows the token": from_both_ends,
    "training mode": lambda: small().train(),
    "not in memory": lambda: small().to("meta"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_in_words(why: str, shared: Place) -> None:
    model = REFUSED[why]()
    with pytest.raises(Incompatible, match=why):
        attach(model, **shared.settings)
    assert "generate" not in vars(model)


def test_options_are_checked(shared: Place) -> None:
    with pytest.raises(ConfigError, match=r"host\.capacity"):
        attach(small(), host={"capasity": "1GiB"})


def test_attached_once_and_detached(place: Place, texts: Texts) -> None:
    model = load("tiny_llama")
    own = model.generate
    attached = place.attach(model)
    with pytest.raises(UsageError, match="already"):
        attach(model, **place.settings)
    detach(model)
    attached.detach()
    detach(model)
    assert model.generate == own
    with place.attach(model) as attached:
        greedy(model, texts.of(140)[0], 1)
        assert attached.stats()["calls"] == 1
    assert model.generate == own
    model.generate = lambda: None
    with pytest.raises(UsageError, match="class's"):
        attach(model, **place.settings)


def test_a_copy_is_another_model(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(140)
    model = load("tiny_llama")
    attached = place.attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert greedy(other, prompt, NEW) != greedy(model, prompt, NEW)
    assert attached.stats()["calls"] == 1


def test_a_model_that_goes_lets_go_of_the_node(own: Place, texts: Texts) -> None:
    model = load("tiny_llama")
    attached = attach(model, **own.settings)
    greedy(model, texts.of(200)[0], 1)
    with attached._attachment.client() as client:
        assert client is not None
    del model
    gc.collect()
    eventually(lambda: not client.alive, "its client has hung up")
    assert attached.stats()["stored_chunks"] == 1


def test_a_self_test_that_fails_refuses(shared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(self: Any, keys: torch.Tensor, values: torch.Tensor, *more: Any) -> Any:
        """A cache that keeps the latest tokens first."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys = torch.cat([keys, self.keys], dim=-2)
        self.values = torch.cat([values, self.values], dim=-2)
        return self.keys, self.values

    monkeypatch.setattr(DynamicLayer, "update", turned)
    with pytest.raises(LayoutMismatch, match="another one"):
        attach(load("tiny_llama"), **shared.settings)
    monkeypatch.undo()
    monkeypatch.setattr(DynamicSlidingWindowLayer, "activate_past_recording", lambda self: None)
    with pytest.raises(LayoutMismatch, match="does not hold"):
        attach(load("tiny_gemma3"), **shared.settings)


def _optimizer(model: Any) -> None:
    step = torch.optim.SGD([model.model.layers[0].self_attn.v_proj.weight], lr=1.0)
    step.param_groups[0]["params"][0].grad = torch.full_like(
        model.model.layers[0].self_attn.v_proj.weight, 0.05
    )
    step.step()


def _load_state(model: Any) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_llama(seed=1), dtype=model.dtype)
    model.load_state_dict(other.state_dict())


def _adapt(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = Doubled(attention.v_proj)


def _convert(model: Any) -> None:
    model.to(torch.bfloat16)


def _rescale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def _behind_its_back(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(2)


CHANGES = [_optimizer, _load_state, _adapt, _rescale, _convert, _behind_its_back]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another(change: Any, place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    model, plain = load("tiny_llama"), load("tiny_llama")
    attached = place.attach(model)
    before = greedy(model, prompt, NEW)
    assert attached.flush()
    greedy(model, prompt, NEW)
    assert attached.last.loaded_tokens == 256
    for one in (model, plain):
        change(one)
    if change is _behind_its_back:
        attached.renew()
    cold = greedy(plain, prompt, NEW)
    assert cold != before
    # Until its weights are hashed again it computes; what it computes then is found again.
    eventually(
        lambda: greedy(model, prompt, NEW) == cold and not attached.last.bypassed, "identified"
    )
    assert attached.last.loaded_tokens == 0
    assert attached.flush()
    answer = greedy(model, prompt, NEW)
    assert answer == cold or change is _convert  # in bfloat16 another cut may turn a token
    assert attached.last.loaded_tokens == 256


def test_adapters_are_refused_until_they_are_merged(place: Place, texts: Texts) -> None:
    """Of PEFT, where it is installed: which adapter is on is no tensor's affair."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    (prompt,) = texts.of(200)
    model = load("tiny_llama")
    attached = place.attach(model)
    base = greedy(model, prompt, NEW)
    assert attached.flush()
    adapted = peft.get_peft_model(model, config).eval()
    answer = greedy(adapted, prompt, NEW, input_ids=torch.tensor([prompt]))
    assert answer != base
    with adapted.disable_adapter():
        assert greedy(adapted, prompt, NEW, input_ids=torch.tensor([prompt])) == base
    assert attached.stats()["bypassed"] == {"the model was changed": 2}
    for one in (adapted, load("tiny_llama")):
        if one is not adapted:
            one.add_adapter(config)
        with pytest.raises(Incompatible, match=r"wrapped|adapters"):
            attach(one, **place.settings)
    attached.detach()
    merged = adapted.merge_and_unload()
    with place.attach(merged) as attached:
        for loaded in (0, 128):
            assert greedy(merged, prompt, NEW) == answer
            assert attached.last.loaded_tokens == loaded
            assert attached.flush()


def test_hooks_that_come_later_refuse_and_go_again(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(200)
    model, plain = load("tiny_llama"), load("tiny_llama")
    attached = place.attach(model)
    cold = greedy(model, prompt, NEW)
    steer = lambda module, args, out: out * 2  # noqa: E731 - as people write it
    hooks = [one.model.layers[1].mlp.register_forward_hook(steer) for one in (model, plain)]
    assert greedy(model, prompt, NEW) == greedy(plain, prompt, NEW)
    assert attached.stats()["bypassed"] == {"the model was changed": 1}
    assert "hooks" in attached.last.bypassed
    hooks[0].remove()
    eventually(lambda: greedy(model, prompt, NEW) == cold and not attached.last.bypassed, "back")


def test_what_decides_the_namespace(place: Place) -> None:
    def digest(model: Any, **more: Any) -> bytes:
        with place.attach(model, **more) as attached:
            subject = attached._subject
            assert subject is not None
            described = subject.described()
            assert described is not None
            assert described.parts.pages == (more.get("share") == "engines")
            return described.parts.digest()

    same = digest(load("tiny_llama"))
    assert digest(load("tiny_llama")) == same
    others = [
        digest(load("tiny_llama", "bfloat16")),
        digest(load("tiny_llama").to(torch.bfloat16)),
        digest(_forward(load("tiny_llama"))),
        digest(load("tiny_llama", attn_implementation="eager")),
        digest(AutoModelForCausalLM.from_pretrained(tiny_llama(seed=1), dtype=torch.float32)),
        digest(load("tiny_llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})),
        digest(load("tiny_llama"), tenant="another"),
        digest(load("tiny_llama"), chunk_tokens=64),
        digest(load("tiny_llama"), share="engines"),
        digest(load("tiny_llama", "bfloat16"), share="engines"),
    ]
    assert len({same, *others}) == 1 + len(others)
    with pytest.MonkeyPatch.context() as patch:
        plain = LlamaAttention.forward
        patch.setattr(LlamaAttention, "forward", lambda *args, **kwargs: plain(*args, **kwargs))
        assert digest(load("tiny_llama")) != same


def _changed() -> Any:
    model = load("tiny_llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return model


def _rounded() -> Any:
    """In bfloat16, its rotary angles too: what it was loaded in has them in float32."""
    return load("tiny_llama").to(torch.bfloat16)


def _scaled() -> Any:
    model = load("tiny_llama")
    _rescale(model)
    return model


def _forward(model: Any) -> Any:
    """With a method that is its own."""
    attention = model.model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    return model


ALONE: dict[str, Callable[[], Any]] = {
    "inv_freq is not what its configuration makes": _rounded,
    "self_attn is not what its configuration makes": _scaled,
    "its code is its own": lambda: _forward(load("tiny_llama")),
    "not the checkpoint's": _changed,
    "not the checkpoint's alone": lambda: load("tiny_llama", rms_norm_eps=1e-3),
    "full attention of one shape": lambda: load("tiny_gemma3"),
    "no folder": small,
}


@pytest.mark.parametrize("why", ALONE)
def test_who_shares_with_no_engine_says_so(
    why: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), place.attach(ALONE[why](), share="engines") as attached:
        subject = attached._subject
        assert subject is not None
        described = subject.described()
        assert described is not None
        assert not described.parts.pages
    assert "shares no KV with other engines" in caplog.text
    assert why in caplog.text


def test_nothing_of_transformers_is_patched(place: Place) -> None:
    classes = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LlamaForCausalLM)
    before = [dict(vars(one)) for one in classes]
    place.attach(load("tiny_llama"))
    assert [dict(vars(one)) for one in classes] == before
