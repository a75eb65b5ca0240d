"""That the SGLang of these tests is one to go by: no KVStrata here."""

from __future__ import annotations

from pathlib import Path

from tests.engine.plain import Texts
from tests.sglang.children import PAGE, Server
from tests.sglang.place import eventually


def pages(num_tokens: int) -> int:
    """Tokens of the whole pages before a prompt's last token, which is always computed."""
    return (num_tokens - 1) // PAGE * PAGE


def test_it_answers_alike_cold_and_out_of_its_own_cache(plain: Server, texts: Texts) -> None:
    for prompt in texts.of(90, 384, 1000):
        cold = plain.ask(prompt)
        warm = plain.ask(prompt)
        plain.flush()
        again = plain.ask(prompt)
        assert (cold.cached, warm.cached, again.cached) == (0, pages(len(prompt)), 0)
        assert warm.like(cold)
        assert again[:2] == cold[:2]
    assert "Traceback" not in plain.said


def test_it_answers_alike_out_of_its_own_storage(
    plain: Server, with_files: Server, stored_pages: Path, texts: Texts
) -> None:
    (prompt,) = texts.of(1000)
    cold = with_files.ask(prompt)
    assert (cold.cached, cold.loaded) == (0, 0)
    whole = len(prompt) // PAGE
    eventually(lambda: len(list(stored_pages.iterdir())) >= whole, f"{whole} pages stored")
    with_files.flush()
    loaded = with_files.ask(prompt)
    assert loaded.cached == loaded.loaded == pages(len(prompt))
    assert loaded.like(cold)
    assert plain.ask(prompt)[:2] == cold[:2]
    assert "Traceback" not in with_files.said


def test_a_wrong_byte_in_its_storage_changes_its_answer(
    with_files: Server, stored_pages: Path, texts: Texts
) -> None:
    (prompt,) = texts.of(700)
    before = set(stored_pages.iterdir())
    cold = with_files.ask(prompt)
    whole = len(prompt) // PAGE
    eventually(lambda: len(set(stored_pages.iterdir()) - before) >= whole, f"{whole} pages")
    for page in set(stored_pages.iterdir()) - before:
        page.write_bytes(bytes(page.stat().st_size))
    with_files.flush()
    loaded = with_files.ask(prompt)
    assert loaded.loaded == pages(len(prompt))
    assert loaded.tokens != cold.tokens
