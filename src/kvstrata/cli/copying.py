"""``kvstrata copy``: copy a prompt's chunks from one tier to another."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.following import follow
from kvstrata.cli.join import NodeOption
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
    source: Annotated[
        str, typer.Option("--from", metavar="TIER", help="Who has them; host is host memory.")
    ],
    target: Annotated[str, typer.Option("--to", metavar="TIER", help="Who is to have them.")],
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
) -> None:
    """Copy the chunks of a prompt from one tier to another, each verified on the way.

    Give the prompt as TEXT, --file, --tokens or --messages. What is there already stays, and what
    the first tier does not have is passed over. ctrl-C ends it, and what is done stays done. Exit
    status 1 if it did not come to its end, or something within it failed.
    """
    prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
    with asking(config_file, settings, node, api) as client:
        follow(client, client.copy(source, target, **prompt))
