"""``kvstrata send``: have another node fetch a prompt's chunks."""

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
    peer: Annotated[
        str, typer.Option("--to", metavar="HOST:PORT", help="The other node, as peers name it.")
    ],
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
    """Have another node fetch the chunks of a prompt from this one, into its host memory.

    Give the prompt as TEXT, --file, --tokens or --messages. Each of the two nodes must be allowed
    by the other's `peer.nodes` or `peer.named`. ctrl-C ends it, and what is done stays done. Exit
    status 1 if it did not come to its end, or something within it failed.
    """
    prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
    with asking(config_file, settings, node, api) as client:
        follow(client, client.send(peer, **prompt))
