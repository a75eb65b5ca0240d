"""``kvstrata lookup``: how much of a prompt is held, and where."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo, json_text
from kvstrata.cli.prompting import (
    FileOption,
    MessagesOption,
    ModelOption,
    NamespaceOption,
    SaltOption,
    TextArgument,
    TokensOption,
    prompt_of,
)


def run(
    text: TextArgument = None,
    file: FileOption = None,
    tokens: TokensOption = None,
    messages: MessagesOption = None,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    salt: SaltOption = "",
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
    prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
    with asking(config_file, settings, node, api) as client:
        found = client.lookup(**prompt)
    if as_json:
        typer.echo(json_text(found.model_dump(mode="json")))
        return
    echo(
        f"{found.leading_tokens} of {found.tokens} tokens would hit: {found.leading_chunks} of "
        f"{found.chunks} chunks of {found.chunk_tokens}"
    )
    for run in found.runs:
        last = run.first + run.count - 1
        echo(f"  chunks {run.first} to {last}: {run.tier or 'nowhere'}")
