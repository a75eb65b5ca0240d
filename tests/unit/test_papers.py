"""The page of papers names every paper that the code names, and files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"(?:arxiv\.org/abs/|arXiv:)(\d{4}\.\d{4,5})")
FILE = re.compile(r"`((?:\w+/)+\w+\.py)`")
METHODS = "docs/selection.md"
"""Whose table the page points to; `scripts/generate_methods.py` makes it."""


def numbers(*files: Path) -> set[str]:
    return {number for file in files for number in NUMBER.findall(file.read_text())}


def test_every_paper_is_on_the_page() -> None:
    named = numbers(*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"))
    told = numbers(ROOT / "docs/papers.md", ROOT / METHODS)
    assert len(told) > 40
    assert named == told


def test_every_file_on_the_page_is_there() -> None:
    files = FILE.findall((ROOT / "docs/papers.md").read_text())
    assert len(files) > 20
    assert not [file for file in files if not (ROOT / "src/kvstrata" / file).is_file()]
