"""``kvstrata calibrate``: what it refuses, and a tiny model from end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvstrata.cli import build_app, calibrate
from kvstrata.codecs import calibration as artefacts
from kvstrata.codecs import codec_named, rope
from kvstrata.errors import UsageError


def config(**parameters: Any) -> SimpleNamespace:
    found = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=3, **parameters
    )
    found.get_text_config = lambda: found
    return found


def test_frequencies_of_plain_and_stretched_positions() -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    found = calibrate.rotary_frequencies(config(rope_parameters=plain))
    assert found.shape == (3, 8)
    assert found[0] == pytest.approx(10000.0 ** -(np.arange(8) / 8))
    linear = plain | {"rope_type": "linear", "factor": 4.0}
    assert calibrate.rotary_frequencies(config(rope_parameters=linear)) == pytest.approx(found / 4)


def test_frequencies_of_llama3_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    assert calibrate.rotary_frequencies(llama)[0] == pytest.approx(theirs.numpy(), rel=1e-5)


def test_frequencies_by_the_kind_of_layer() -> None:
    parameters = {
        "full": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding": {"rope_theta": 1e4, "rope_type": "default"},
    }
    kinds = ["sliding", "full", "sliding"]
    found = calibrate.rotary_frequencies(config(rope_parameters=parameters, layer_types=kinds))
    assert found[:, 1] == pytest.approx([1e4 ** (-1 / 8), 1e6 ** (-1 / 8), 1e4 ** (-1 / 8)])


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
)
def test_positions_that_cannot_be_undone(parameters: dict[str, Any] | None) -> None:
    with pytest.raises(UsageError, match="kvtc"):
        calibrate.rotary_frequencies(config(rope_parameters=parameters))


def test_keys_that_turn_otherwise_are_noticed() -> None:
    rng = np.random.default_rng(0)
    frequencies = 100.0 ** -(np.arange(8) / 8)
    ids = [int(token) for token in rng.integers(0, 9, 64)]
    tokens = rng.normal(0, 1, (9, 2, 16)).astype(np.float32)[ids]
    angles, keys = rope.angles(frequencies.tobytes(), 0, 64), np.empty((2, 64, 16), np.float32)
    rope.rotate(tokens, angles.cos, angles.sin, 1e30, keys)
    calibrate._check_rotation(keys, ids, frequencies)
    with pytest.raises(UsageError, match="turn"):
        calibrate._check_rotation(keys[..., ::-1], ids, frequencies)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"kvstrata\[quality\]"):
        calibrate.learn("model", 2048, "text")


def test_texts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        calibrate._text(tmp_path / "none")
    with pytest.raises(UsageError, match="4096 are needed"):
        calibrate._documents(list(range(3000)), 4096)
    documents = calibrate._documents(list(range(9000)), 4096)
    assert [document[0] for document in documents] == [0, 4500]
    assert {len(document) for document in documents} == {2048}


class Words:
    """A tokenizer that needs no model: a token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 96 for letter in text]


def test_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
            )
        )
    tiny.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Words())
    result = CliRunner().invoke(
        build_app(), ["calibrate", str(tmp_path / "tiny"), "--tokens", "2048"]
    )
    assert result.exit_code == 0, result.output
    (calibration,) = artefacts.stored()
    assert calibration.fingerprint.hex() in result.stdout
    assert (calibration.header.layers, calibration.header.heads, calibration.header.dim) == (
        2,
        2,
        16,
    )
    assert calibration.header.tokens == 1532
    assert codec_named("kvtc-3").name == f"kvtc-3@{calibration.fingerprint.hex()[:8]}"
