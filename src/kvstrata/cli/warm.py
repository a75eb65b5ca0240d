"""``kvstrata warm``: have an engine compute prompts ahead of need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.following import follow
from kvstrata.cli.join import NodeOption
from kvstrata.cli.prompting import read
from kvstrata.errors import UsageError


def run(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help='One prompt a line: a JSON text, a list of token ids, or {"prompt": ...}; - is '
            "stdin.",
        ),
    ],
    url: Annotated[
        str, typer.Option("--engine", metavar="URL", help="Its OpenAI server, without /v1.")
    ],
    model: Annotated[str, typer.Option("--model", help="As that server calls it.")],
    at_once: Annotated[
        int,
        typer.Option("--at-once", min=1, max=64, help="How many prompts it is given at a time."),
    ] = 2,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """Have an engine compute a list of prompts, so that they are stored before anybody asks.

    Each is asked for one token. Shows how far it is; ctrl-C ends it, and what is computed stays.
    Exit status 1 if a prompt failed.
    """
    listed = _listed(read(prompts))
    with asking(config_file, settings, node, api) as client:
        job = client.warm(url, model, listed, at_once)
        follow(client, job, "prompts")


def _listed(text: str) -> list[str | list[int]]:
    found: list[str | list[int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            one: Any = json.loads(line)
        except ValueError as error:
            raise UsageError(f"line {number} is no JSON: {error}") from error
        prompt = one.get("prompt") if isinstance(one, dict) else one
        if not isinstance(prompt, str | list):
            raise UsageError(f"line {number} is no prompt: expected a text or a list of token ids")
        found.append(prompt)
    if not found:
        raise UsageError("there is no prompt in it")
    return found
