"""``kvstrata lookup``: how much of a prompt is held, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.errors import UsageError


def run(
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="A prompt, as for /v1/completions.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="The prompt from a file; - is stdin."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", metavar="IDS", help="Token ids, such as 1,15,2; @FILE: of a file."
        ),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option("--messages", metavar="FILE", help="Messages of a chat, JSON; - is stdin."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Whose; needed where engines told the node of several."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="HEX", help="The same by digest.")
    ] = None,
    salt: Annotated[str, typer.Option("--salt", help="The request's cache_salt.")] = "",
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say how many leading tokens of a prompt would hit, and in which tiers. Changes nothing.

    Give the prompt as TEXT, --file, --tokens or --messages. Text is made into tokens by the
    model's own files, which have to be on the machine that answers.

    Exit status 1 if no node answers.
    """
    prompt = _prompt(text, file, tokens, messages)
    with asking(config_file, settings, node, api) as client:
        found = client.lookup(**prompt, model=model, namespace=namespace, salt=salt)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    typer.echo(
        f"{found.leading_tokens} of {found.tokens} tokens would hit: {found.leading_chunks} of "
        f"{found.chunks} chunks of {found.chunk_tokens}"
    )
    for run in found.runs:
        last = run.first + run.count - 1
        typer.echo(f"  chunks {run.first} to {last}: {run.tier or 'nowhere'}")


def _prompt(
    text: str | None, file: Path | None, tokens: str | None, messages: Path | None
) -> dict[str, Any]:
    given = [one for one in (text, file, tokens, messages) if one is not None]
    if len(given) != 1:
        raise UsageError("give the prompt in one way: TEXT, --file, --tokens or --messages")
    if text is not None:
        return {"text": text}
    if file is not None:
        return {"text": read(file)}
    if tokens is not None:
        words = read(Path(tokens[1:])) if tokens.startswith("@") else tokens
        try:
            return {"tokens": [int(word) for word in words.replace(",", " ").split()]}
        except ValueError as error:
            raise UsageError(f"--tokens: expected whole numbers: {error}") from error
    assert messages is not None
    try:
        return {"messages": json.loads(read(messages))}
    except ValueError as error:
        raise UsageError(f"{messages} is no JSON: {error}") from error


def read(file: Path) -> str:
    """A file's text, or standard input's for ``-``. Raises `UsageError`."""
    try:
        if str(file) == "-":
            return typer.get_text_stream("stdin").read()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
