"""A model that engines share is the same for all of them, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.connectors.identity import checkpoint_folder, shared_layout, shared_namespace
from kvstrata.errors import Incompatible
from kvstrata.keys import Namespace

LAYOUT = "full 30 layers, 2 states, 3 heads of 64, bfloat16"
CONFIG = {"hidden_size": 576, "rope_theta": 1e5, "rope_scaling": None}

Make = Callable[..., Namespace]


def saved(folder: Path, config: Any = CONFIG, **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    described = {**config, **more} if isinstance(config, dict) else config
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(folder: str = "", **changed: Any) -> Namespace:
        arguments = {
            "folder": folder or saved(tmp_path / "model"),
            "weights": "5f3a",
            "dtype": "bfloat16",
            "kv_dtype": "bfloat16",
            "max_tokens": 8192,
            "layout": LAYOUT,
            "page_tokens": 128,
        }
        return shared_namespace(**{**arguments, **changed})

    return made


def test_where_and_by_what_a_checkpoint_was_saved_does_not_matter(
    make: Make, tmp_path: Path
) -> None:
    other = saved(
        tmp_path / "other",
        dict(reversed(CONFIG.items())),
        _name_or_path="elsewhere",
        transformers_version="9.9",
    )
    assert make(other).digest() == make().digest()


def test_golden(make: Make) -> None:
    """Another digest would mean that nothing that is stored is found again."""
    assert (
        make().digest().hex() == "7d736a7878b855ef4278b06c78039bcc256920fe2e7ba25c1272613335168632"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "5f3b"},
        {"dtype": "float16"},
        {"kv_dtype": "float16"},
        {"max_tokens": 4096},
        {"layout": shared_layout(30, 2, 3, 32, "bfloat16")},
        {"page_tokens": 64},
        {"tensor_parallel": 3},
        {"tenant": "other"},
    ],
)
def test_whatever_decides_what_kv_means_changes_it(make: Make, changed: dict[str, Any]) -> None:
    assert make(**changed).digest() != make().digest()


def test_another_configuration_changes_it(make: Make, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", rope_theta=1e6)
    nested = saved(tmp_path / "nested", text_config={"rope_theta": 1e5})
    assert len({one.digest() for one in (make(), make(other), make(nested))}) == 3


def test_pages_have_no_chunks_namespace() -> None:
    of_chunks = Namespace("model", LAYOUT, 128)
    assert Namespace("model", LAYOUT, 128, pages=True).digest() != of_chunks.digest()


def test_a_layout_in_words() -> None:
    assert shared_layout(30, 2, 3, 64, "bfloat16") == LAYOUT


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"weights": "dummy:1f"}, "weights are random"),
        ({"pipeline_parallel": 2}, "2 stages of a pipeline"),
        ({"kv_dtype": "float8_e4m3fn"}, "scales that each engine has of its own"),
        ({"kv_dtype": "auto"}, "scales that each engine has of its own"),
        ({"quantization": "fp8"}, "quantized by the engine"),
    ],
)
def test_what_cannot_be_shared_says_why(make: Make, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(Incompatible, match=why):
        make(**changed)


def test_a_checkpoint_that_is_quantized_may_be_shared(make: Make, tmp_path: Path) -> None:
    folder = saved(tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    assert make(folder, quantization="awq_marlin").digest() == make(folder).digest()


def test_a_folder_without_a_configuration_is_not_shared(make: Make, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="cannot be read"):
        make(str(tmp_path))
    with pytest.raises(Incompatible, match="describes no model"):
        make(saved(tmp_path / "list", [CONFIG]))


def test_a_hub_model_is_known_by_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123abcd" * 5
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    cached = hub.try_to_load_from_cache
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda *a, **k: cached(*a, cache_dir=tmp_path, **k)
    )
    assert checkpoint_folder("org/model", commit) == str(snapshot)
    assert checkpoint_folder(str(snapshot)) == str(snapshot)
    for model, which in (("org/model", None), ("org/other", commit), ("org/model", "f" * 40)):
        with pytest.raises(Incompatible, match="has no folder"):
            checkpoint_folder(model, which)
