"""Presses in a process of their own: what goes there and comes back, with a stand-in for kvpress,
and with kvpress itself where its environment is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.little_models import byte_pairs, little  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from kvstrata.errors import UsageError  # noqa: E402
from kvstrata.selection.presses import ENVIRONMENT, HOW, Presses  # noqa: E402
from kvstrata.selection.select import select  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS = list(range(10, 50))

STAND_IN = '''
"""Three presses: one prunes, one masks, one changes what it keeps."""
from contextlib import contextmanager
import torch
print("a library says something")

class FirstPress:
    def __init__(self, compression_ratio):
        self.kept = 1 - compression_ratio

    @contextmanager
    def __call__(self, model):
        hooks = [
            layer.self_attn.register_forward_hook(self.hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        count = int(self.kept * layer.keys.shape[2])
        order = torch.arange(count).flip(0)  # presses keep no order
        layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]

class ChangingPress(FirstPress):
    def hook(self, module, args, kwargs, output):
        super().hook(module, args, kwargs, output)
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        layer.keys = layer.keys * 2

class MaskingPress(FirstPress):
    """Of head 0 of each layer the first tokens, of head 1 all but the first."""

    def __init__(self, press):
        self.kept = press.kept

    def hook(self, module, args, kwargs, output):
        size = kwargs["past_key_values"].layers[module.layer_idx].keys.shape[2]
        count = int(self.kept * size)
        heads = torch.tensor([0] * (size - count) + [1] * count)
        places = torch.tensor([*range(count, size), *range(count)])
        module.masked_key_indices = (torch.zeros_like(heads), heads, places)

class DyingPress(FirstPress):
    def hook(self, module, args, kwargs, output):
        import os, sys
        print("out of ideas", file=sys.stderr, flush=True)
        os._exit(3)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little("Llama", byte_pairs(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose kvpress is ours, and whose Python finds it first."""
    environment = tmp_path_factory.mktemp("venv")
    (environment / "bin").mkdir()
    (environment / "kvpress.py").write_text(STAND_IN)
    python = environment / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(environment)!r})\n"
        "assert sys.argv[1] == '-I'\n"
        "runpy.run_path(sys.argv[2], run_name='__main__')\n"
    )
    python.chmod(0o755)
    return environment


@pytest.fixture(scope="module")
def presses(folder: Path, stand_in: Path) -> Iterator[Presses]:
    with Presses(folder, stand_in) as up:
        yield up


def test_rows_that_are_left_are_found_again(presses: Presses) -> None:
    counts, positions = presses.positions("First", TOKENS, 0.25)
    assert counts.tolist() == [[10, 10], [10, 10]]
    assert all(head.tolist() == list(range(10)) for layer in positions for head in layer)


def test_tokens_that_are_only_masked_are_gone(presses: Presses) -> None:
    counts, positions = presses.positions("Masking(First)", TOKENS, 0.25)
    assert counts.tolist() == [[10, 30], [10, 30]]
    assert positions[1][0].tolist() == list(range(10))
    assert positions[1][1].tolist() == list(range(10, 40))
    # And nothing of it stays for the next one.
    counts, _ = presses.positions("First", TOKENS, 0.5)
    assert counts.tolist() == [[20, 20], [20, 20]]


def test_other_tokens_have_another_cache(presses: Presses) -> None:
    presses.positions("First", TOKENS, 0.25)
    counts, _ = presses.positions("First", TOKENS[:20], 0.5)
    assert counts.tolist() == [[10, 10], [10, 10]]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Changing", "layer 0 has rows that no token of the context had"),
        ("Nothing", "kvpress has no press 'Nothing'"),
        ("First(", "is no press"),
        ("__import__('os')", "is no press"),
    ],
)
def test_what_cannot_be_told(presses: Presses, name: str, why: str) -> None:
    with pytest.raises(UsageError) as error:
        presses.positions(name, TOKENS, 0.25)
    assert why in str(error.value)
    # The program is still there.
    assert presses.positions("First", TOKENS, 0.25)[0].sum() == 40


def test_a_program_that_dies_says_why(folder: Path, stand_in: Path) -> None:
    with Presses(folder, stand_in) as up:
        with pytest.raises(UsageError, match=r"(?s)ended with 3: .*out of ideas"):
            up.positions("Dying", TOKENS, 0.25)
        with pytest.raises(UsageError, match="ended with 3"):
            up.positions("First", TOKENS, 0.25)


def test_no_model_or_no_environment(tmp_path: Path, stand_in: Path) -> None:
    with pytest.raises(UsageError, match="kvpress: "):
        Presses(tmp_path, stand_in)
    with pytest.raises(UsageError, match=HOW):
        Presses(tmp_path, tmp_path)


def test_selected_through_the_one_interface(folder: Path, stand_in: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([TOKENS]), past_key_values=cache)
    kept = select(model, cache, TOKENS, "kvpress:First", fraction=0.25, kvpress=stand_in)
    assert kept.counts.tolist() == [[10, 10], [10, 10]]
    keys = cache.layers[1].keys[0, 1, :10].numpy()
    assert np.array_equal(kept.keys[kept.head(1, 1)].view(np.float32), keys)


@pytest.mark.parametrize("name", ["Knorm", "ExpectedAttention", "AdaKV(SnapKV)"])
def test_kvpress_itself(folder: Path, name: str) -> None:
    environment = ROOT / ENVIRONMENT
    if not environment.exists():
        pytest.skip(HOW)
    tokens: list[Any] = [7 * place % 900 for place in range(200)]
    with Presses(folder, environment) as up:
        counts, positions = up.positions(name, tokens, 0.5)
    assert int(counts.sum()) == 2 * 2 * 100
    for layer in positions:
        for head in layer:
            assert (head.diff() > 0).all()
