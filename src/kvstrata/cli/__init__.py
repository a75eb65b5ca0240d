"""The ``kvstrata`` command: one module a subcommand, each a function that typer reads.

A new subcommand is a file here and a line in `build_app`. What is slow to import is imported
inside the function, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from kvstrata import __version__
from kvstrata.cli import (
    api,
    calibrate,
    clear,
    cluster,
    config,
    copying,
    demo,
    doctor,
    drain,
    explain,
    inspect,
    jobs,
    lookup,
    ls,
    metrics,
    pin,
    prefetch,
    proxy,
    quality,
    quota,
    records,
    reload,
    scrub,
    secret,
    send,
    serve,
    status,
    top,
    transcode,
    unpin,
    warm,
)
from kvstrata.cli.plain import echo
from kvstrata.errors import KVStrataError


def build_app() -> typer.Typer:
    """All subcommands in one application."""
    app = typer.Typer(
        name="kvstrata",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(root)
    app.command("serve")(serve.run)
    app.command("status")(status.run)
    app.command("top")(top.run)
    app.command("metrics")(metrics.run)
    app.command("explain")(explain.run)
    app.command("records")(records.run)
    app.command("clear")(clear.run)
    app.add_typer(cluster.app, name="cluster")
    app.command("lookup")(lookup.run)
    app.command("warm")(warm.run)
    app.command("prefetch")(prefetch.run)
    app.command("copy")(copying.copy)
    app.command("move")(copying.move)
    app.command("send")(send.run)
    app.command("transcode")(transcode.run)
    app.command("ls")(ls.run)
    app.command("inspect")(inspect.run)
    app.command("scrub")(scrub.run)
    app.command("drain")(drain.run)
    app.command("reload")(reload.run)
    app.command("jobs")(jobs.run)
    app.command("pin")(pin.run)
    app.command("unpin")(unpin.run)
    app.command("quota")(quota.run)
    app.command("api")(api.run)
    app.command("config")(config.run)
    app.command("doctor")(doctor.run)
    app.command("demo")(demo.run)
    app.command("calibrate")(calibrate.run)
    app.command("quality")(quality.run)
    app.command("proxy")(proxy.run)
    app.command("secret")(secret.run)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvstrata {__version__}")
        raise typer.Exit


def root(
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and end.",
        callback=_print_version,
        is_eager=True,  # before a missing command is an error
    ),
) -> None:
    """A KV-cache layer for LLM inference: what a prompt computed once is never prefilled again.

    Every option of the configuration can be set in a file (--config or KVSTRATA_CONFIG), in the
    environment (KVSTRATA_HOST_CAPACITY=8GiB) or with --set host.capacity=8GiB.
    """


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and exit status 2."""
    try:
        build_app()()
    except KVStrataError as error:
        echo(f"kvstrata: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
