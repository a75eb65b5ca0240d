"""Text becomes the tokens that an engine makes of it, by files on this machine alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from kvstrata.control import tokenizing
from kvstrata.control.tokenizing import ModelTokenizer, Tokenizers, folder_of
from kvstrata.errors import UsageError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'x' %}"
    "{{ raise_exception('no x') }}{% endif %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A model of few words, whose prompts begin with a token of their own."""
    words = ["<s>", "[UNK]", "user", "assistant", "hello", "world", "system"]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_text_begins_as_the_tokenizer_says_and_is_not_cut(tmp_path: Path) -> None:
    assert ModelTokenizer(model(tmp_path)).text("hello world hello world") == [0, 4, 5, 4, 5]


def test_what_is_no_unicode_is_refused(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(model(tmp_path))
    with pytest.raises(UsageError, match="no Unicode"):
        tokenizer.text("hello \ud800")
    with pytest.raises(UsageError, match="no Unicode"):
        tokenizer.messages([{"role": "user", "content": "\ud800"}])


def test_messages_are_a_text_by_the_template_with_nothing_added(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(model(tmp_path))
    found = tokenizer.messages([{"role": "user", "content": "hello"}])
    assert found == [0, 2, 4, 3]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }} world")
    tokenizer = ModelTokenizer(tmp_path)
    assert tokenizer.messages([{"role": "user", "content": "hello"}]) == [4, 5]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (TEMPLATE, [{"role": "x", "content": ""}]),
        ("{{ messages[0].content.missing.more }}", [{"content": ""}]),
        ("{{ ''.__class__.__mro__ }}", []),
        ("{{ messages.append(1) }}", []),
        ("{{ 1 + messages[0]['content'] }}", [{"content": "a"}]),
        (None, [{"role": "user", "content": ""}]),
    ],
)
def test_what_a_template_refuses_is_a_usage_error(
    tmp_path: Path, template: str | None, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match="template"):
        ModelTokenizer(model(tmp_path, template)).messages(messages)


def test_what_is_not_here_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    commit = "0123abc"
    snapshot = tmp_path / "hub/models--org--name/snapshots" / commit
    for name, weights in [
        ("org/name", f"hub:org/name@{commit}"),
        ("org/name", "hub:org/name@../.."),
        ("org/name", f"hub:other@{commit}"),
        ("org/name", "blake3:0011"),
        ("../../etc", "hub:../../etc@x"),
        (str(tmp_path / "missing"), "w"),
        ("", ""),
    ]:
        with pytest.raises(UsageError, match="not on this machine"):
            folder_of(name, weights)
    model(snapshot)
    assert folder_of("org/name", f"hub:org/name@{commit}") == snapshot
    assert folder_of(str(tmp_path), "w") == tmp_path


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="is no tokenizer"):
        ModelTokenizer(tmp_path)
    model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        ModelTokenizer(tmp_path)


def test_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MOST", 2)
    folders = [str(model(tmp_path / name)) for name in "abc"]
    known = Tokenizers()
    first = known.of(folders[0], "")
    second = known.of(folders[1], "")
    assert known.of(folders[0], "") is first
    known.of(folders[2], "")
    assert known.of(folders[0], "") is first
    assert known.of(folders[1], "") is not second


def test_it_agrees_with_transformers_on_a_real_model() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from kvstrata.testing.models import smollm2

    folder = smollm2()
    ours, theirs = ModelTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox;\n\n\tnaïve 東京 👩‍💻 <|im_start|>user  x"
    assert ours.text(text) == theirs.encode(text)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "More?"},
    ]
    for some in (messages, messages[1:], messages[1:2]):
        wanted = theirs.apply_chat_template(some, add_generation_prompt=True, tokenize=True)
        assert ours.messages(some) == list(getattr(wanted, "input_ids", wanted))
