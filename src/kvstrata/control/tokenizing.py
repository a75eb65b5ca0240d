"""From text to token ids as an engine makes them, by the model's own files on this machine.

Nothing is fetched and no code of a model's runs: `tokenizer.json` says how text is cut, the chat
template (Jinja, in its sandbox) how messages become text. It has no need of transformers, which
brings torch with it.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from kvstrata.errors import UsageError

MOST = 4
"""Models whose tokenizer is kept."""
MAX_CONFIG_BYTES = 64 << 20


def folder_of(name: str, weights: str) -> Path:
    """Where a model's files are: its own path, or the hub's cache for a model of the hub.

    Args:
        name: as the engine was given it.
        weights: its identity, which names the revision of a model of the hub.

    Raises:
        UsageError: they are not on this machine.
    """
    if os.path.isabs(name) and os.path.isdir(name):
        return Path(name)
    repository, at, commit = weights.removeprefix("hub:").rpartition("@")
    if at and repository == name and commit.isalnum():
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        if folder.is_dir():
            return folder
    raise UsageError(
        f"the files of the model {name} are not on this machine; give token ids instead of text"
    )


class ModelTokenizer:
    """The tokenizer of one model. Thread-safe.

    Args:
        folder: with the model's `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UsageError(f"{folder} has no tokenizer.json; give token ids instead of text")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers has no error of its own
            raise UsageError(f"{file} is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read_json(folder / "tokenizer_config.json")
        separate = folder / "chat_template.jinja"
        source = _read(separate) if separate.is_file() else self._config.get("chat_template")
        if isinstance(source, list):
            source = next((one["template"] for one in source if one["name"] == "default"), None)
        self._template = _environment().from_string(source) if isinstance(source, str) else None

    def text(self, text: str) -> list[int]:
        """Of a prompt, as for `/v1/completions`: with the tokens that begin one.

        Raises:
            UsageError: a text that UTF-8 cannot encode.
        """
        return self._ids(text, begins=True)

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Of a chat, as for `/v1/chat/completions`: up to where the assistant speaks.

        Raises:
            UsageError: the model has no template, or its template refuses these messages; or a
                text that UTF-8 cannot encode.
        """
        if self._template is None:
            raise UsageError("this model has no chat template; give text or token ids")
        special = {
            name: _content(self._config.get(name))
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, **special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        return self._ids(text, begins=False)

    def _ids(self, text: str, *, begins: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is no Unicode: {error.reason}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begins).ids
        return ids


class Tokenizers:
    """Those of the models that were asked for last. Thread-safe; loading blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: OrderedDict[Path, ModelTokenizer] = OrderedDict()

    def of(self, name: str, weights: str) -> ModelTokenizer:
        """Of a model by its name and identity; raises as `folder_of` and `ModelTokenizer`."""
        folder = folder_of(name, weights)
        with self._lock:
            if folder not in self._loaded:
                self._loaded[folder] = ModelTokenizer(folder)
            self._loaded.move_to_end(folder)
            if len(self._loaded) > MOST:
                self._loaded.popitem(last=False)
            return self._loaded[folder]


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token or "")


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as source:
            return source.read(MAX_CONFIG_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except ValueError as error:
        raise UsageError(f"{file} is no JSON") from error
    return found if isinstance(found, dict) else {}
