"""SGLang's demo from end to end, with a model that is small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.cli.demo_results import WAYS
from kvstrata.cli.demo_sglang import SGLangDemo


def test_one_document_by_every_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.testing.models.smollm2", lambda: tiny_llama)
    demo = SGLangDemo(tmp_path, (1,))
    demo.run()  # it raises where a hit comes from elsewhere than it is said to
    (asked,) = demo.asked
    assert asked.prompt_tokens == 1024 + 16
    assert list(asked.tokens) == list(WAYS)
    assert asked.same
    assert all(asked.ms(way) > 0 for way in WAYS)
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
