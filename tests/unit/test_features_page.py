"""The page of vLLM's features names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm-features.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\btest_\w+\.py(?:::test_\w+)?", PAGE))))
def test_every_test_that_it_names_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    folders = (ROOT / "tests" / folder for folder in ("engine", "connector"))
    texts = [(path / file).read_text() for path in folders if (path / file).exists()]
    assert any(f"def {test or 'test_'}" in text for text in texts)
