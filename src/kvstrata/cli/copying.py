"""``kvstrata copy`` and ``kvstrata move``: a prompt's chunks from one tier to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from kvstrata.control import Client
    from kvstrata.control.verbs.jobs import Job

COPY = """Copy the chunks of a prompt from one tier to another, each verified on the way.

Give the prompt as TEXT, --file, --tokens or --messages. What is there already stays, and what
the first tier does not have is passed over. ctrl-C ends it, and what is done stays done. Exit
status 1 if it did not come to its end, or something within it failed.
"""
MOVE = """Move the chunks of a prompt from one tier to another, each verified on the way.

As `kvstrata copy`, and a chunk is removed from the first tier once all of it stands in the
second; a node that dies meanwhile has it in one of them, or in both. ctrl-C ends it, and what
is done stays done. Exit status 1 if it did not come to its end, or something within it failed.
"""


def _command(begin: Callable[[Client], Callable[..., Job]], told: str) -> Callable[..., None]:
    """A command that begins such a job and follows it."""

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
        prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
        with asking(config_file, settings, node, api) as client:
            follow(client, begin(client)(source, target, **prompt))

    run.__doc__ = told
    return run


copy = _command(lambda client: client.copy, COPY)
move = _command(lambda client: client.move, MOVE)
