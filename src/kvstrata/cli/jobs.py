"""``kvstrata jobs``: long work of a node, and its end."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption
from kvstrata.cli.plain import echo, json_text


def run(
    cancel: Annotated[
        str | None, typer.Option("--cancel", metavar="ID", help="End this one.")
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the jobs that run and the last ones that ended, the latest first, or end one.

    Such as `prefetch`, `move`, `scrub` and `drain` are, from whoever asked for them.
    """
    with asking(config_file, settings, node, api) as client:
        found = [client.cancel(cancel)] if cancel else client.jobs(limit=1000).jobs
    for job in found:
        if as_json:
            typer.echo(json_text(job.model_dump(mode="json"), None))
            continue
        failed = f", {job.failed} failed" if job.failed else ""
        note = f"; {job.note}" if job.note else ""
        about = f" {job.about}" if job.about else ""
        echo(f"{job.id}  {job.kind}{about}: {job.state}, {job.done} of {job.total}{failed}{note}")
