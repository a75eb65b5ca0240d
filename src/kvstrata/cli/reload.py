"""``kvstrata reload``: hold a running node to its changed configuration."""

from __future__ import annotations

import typer

from kvstrata.cli.asking import ApiOption, asking
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    api: ApiOption = None,
) -> None:
    """Hold a running node to this configuration, as far as that may change while it runs.

    What needs a restart is refused by its name, and then nothing changes; exit status 1.
    docs/api.md says what may change.
    """
    config = configured(config_file, settings, node)
    with asking(config_file, settings, node, api) as client:
        reloaded = client.reload(config.to_dict())
    typer.echo(f"changed: {', '.join(reloaded.changed) or 'nothing'}")
    if reloaded.engines:
        typer.echo(f"for engines that start from now on: {', '.join(reloaded.engines)}")
