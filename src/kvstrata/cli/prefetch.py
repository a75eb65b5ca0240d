"""``kvstrata prefetch``: bring a prompt's chunks into host memory, ahead of need."""

from __future__ import annotations

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
    """Bring the leading chunks of a prompt into host memory before somebody asks for them.

    Give the prompt as TEXT, --file, --tokens or --messages. It ends where no tier has the next
    chunk, or there is no room, and says which. ctrl-C ends it, and what is done stays done. Exit
    status 1 if it did not come to its end, or something within it failed.
    """
    prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
    with asking(config_file, settings, node, api) as client:
        follow(client, client.prefetch(**prompt))
