"""``kvstrata metrics``: a running node's metrics, as Prometheus reads them."""

from __future__ import annotations

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, fail, join_or_exit
from kvstrata.errors import DeadlineExceeded, NodeUnavailable


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
) -> None:
    """Print a running node's metrics in Prometheus' text format.

    docs/metrics.md says what each of them is. It never starts a node. Exit status 1 and one line on
    stderr if none answers, or if prometheus-client is not installed.
    """
    try:
        from kvstrata.observe.rendering import render
    except ModuleNotFoundError:
        fail(ModuleNotFoundError("metrics need: pip install 'kvstrata[control]'"))
    client = join_or_exit(configured(config_file, settings, node))
    try:
        typer.echo(render(client.metrics()).decode(), nl=False)
    except (NodeUnavailable, DeadlineExceeded) as error:
        fail(error)
    finally:
        client.close()
