"""``kvstrata pin``: keep a prompt's chunks, or see what is kept."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo
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
from kvstrata.errors import UsageError
from kvstrata.units import parse_duration


def run(
    name: Annotated[
        str | None, typer.Option("--name", help="By which it is renewed, and ended.")
    ] = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="For how long, such as 30min or 7d.")
    ] = "1d",
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
    """Keep the chunks of a prompt from being evicted from the node's own tiers, for a time.

    Give the prompt as TEXT, --file, --tokens or --messages; the same name again renews the pin. It
    counts against the quota of pins ([pins] in the configuration), and the head is kept where that
    does not do for all: exit status 1 if something is not kept. Without --name all pins are listed.
    """
    if name is None and any(one is not None for one in (text, file, tokens, messages)):
        raise UsageError("--name: missing; a pin is renewed and ended by its name")
    try:
        ttl_s = parse_duration(ttl)
    except ValueError as error:
        raise UsageError(f"--ttl: {error}") from error
    with asking(config_file, settings, node, api) as client:
        if name is not None:
            prompt = prompt_of(text, file, tokens, messages, model, namespace, salt)
            pinned = client.pin(name, ttl_s, **prompt)
        else:
            after = ""
            while True:
                page = client.pins(after, 256)
                for one in page.pins:
                    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.until))
                    kept = f"{one.kept} of {one.chunks} chunks"
                    echo(f"{one.name}  owner {one.owner}  {kept}  until {until}")
                if not (after := page.next):
                    return
    tiers = ", ".join(f"{tier} {count}" for tier, count in pinned.tiers.items())
    echo(f"{pinned.kept} of {pinned.chunks} chunks are kept: {tiers or 'nowhere'}")
    for tier, note in pinned.notes.items():
        echo(f"  {tier}: {note}")
    if pinned.kept < pinned.chunks:
        raise typer.Exit(1)
