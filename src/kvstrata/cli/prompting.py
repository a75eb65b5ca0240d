"""How a command is told a prompt, and whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from kvstrata.control.client import Prompting

TextArgument = Annotated[
    str | None, typer.Argument(metavar="[TEXT]", help="A prompt, as for /v1/completions.")
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="The prompt from a file; - is stdin."),
]
TokensOption = Annotated[
    str | None,
    typer.Option("--tokens", metavar="IDS", help="Token ids, such as 1,15,2; @FILE: of a file."),
]
MessagesOption = Annotated[
    Path | None,
    typer.Option("--messages", metavar="FILE", help="Messages of a chat, JSON; - is stdin."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Whose; needed where engines told the node of several."),
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", metavar="HEX", help="The same by digest.")
]
SaltOption = Annotated[str, typer.Option("--salt", help="The request's cache_salt.")]


def prompt_of(
    text: str | None,
    file: Path | None,
    tokens: str | None,
    messages: Path | None,
    model: str | None,
    namespace: str | None,
    salt: str,
) -> Prompting:
    """What the options name, as the client takes it.

    Raises:
        UsageError: it is given in no way or in several, or cannot be read.
    """
    if sum(one is not None for one in (text, file, tokens, messages)) != 1:
        raise UsageError("give the prompt in one way: TEXT, --file, --tokens or --messages")
    prompt: Prompting = {"salt": salt}
    if model is not None:
        prompt["model"] = model
    if namespace is not None:
        prompt["namespace"] = namespace
    if text is not None:
        prompt["text"] = text
    elif file is not None:
        prompt["text"] = read(file)
    elif tokens is not None:
        prompt["tokens"] = token_ids(tokens)
    elif messages is not None:
        try:
            prompt["messages"] = json.loads(read(messages))
        except ValueError as error:
            raise UsageError(f"{messages} is no JSON: {error}") from error
    return prompt


def token_ids(words: str) -> list[int]:
    """Whole numbers, with or without commas and the brackets of a JSON list; ``@FILE``: of a file.

    Raises:
        UsageError: they are none, or the file cannot be read.
    """
    if words.startswith("@"):
        words = read(Path(words[1:]))
    try:
        return [int(word) for word in words.strip("[] \n").replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--tokens: expected whole numbers: {error}") from error


def read(file: Path) -> str:
    """A file's text, or standard input's for ``-``. Raises `UsageError`."""
    try:
        if str(file) == "-":
            return typer.get_text_stream("stdin").read()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
