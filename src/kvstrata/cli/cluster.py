"""``kvstrata cluster``: the fleet by its registry: who is there, who has what, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli import commanding
from kvstrata.cli.config import ConfigFile, Settings, read_config
from kvstrata.cli.plain import echo, json_text, listed, shown
from kvstrata.cli.registered import ModelNamespace, TokensFile, keyed, registry_of

if TYPE_CHECKING:
    from kvstrata.fleet.holdings import Found
    from kvstrata.fleet.members import Member


app = typer.Typer(
    help="The fleet, by its registry: members, lookup, and commands to all of its nodes.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.callback()
def cluster(context: typer.Context) -> None:
    """The fleet, by its registry: its members, unless another subcommand is given."""
    if context.invoked_subcommand is None:
        members()


@app.command("members")
def members(
    config_file: ConfigFile = None, settings: Settings = None, as_json: AsJson = False
) -> None:
    """Show the nodes that are registered, what each holds, and what it runs.

    Exit status 1 if the registry does not answer.
    """
    from msgspec import to_builtins

    from kvstrata.cli.fleet import MOST_SKEW_S

    config = read_config(config_file, settings or [])
    with registry_of(config) as registry:
        found = registry.members()
    if as_json:
        typer.echo(json_text(to_builtins(found)))
        return
    from rich.console import Console

    Console().print(table(found))
    for one in found:
        if abs(one.clock_offset_s) > MOST_SKEW_S:
            echo(
                f"{one.name}: its clock is wrong, or the registry's; what it stores is dated by "
                "the registry's, but its pins end, and its log goes, by its own"
            )


@app.command("lookup")
def lookup(
    tokens: TokensFile,
    config_file: ConfigFile = None,
    settings: Settings = None,
    namespace: ModelNamespace = None,
    as_json: AsJson = False,
) -> None:
    """Show which nodes hold how much of a prompt, and in which of their own tiers.

    The keys are made with the deployment's secret of this machine (`secret_file`).
    """
    from kvstrata.fleet.holdings import lookup as look_up
    from kvstrata.secret import load_secrets

    config = read_config(config_file, settings or [])
    with registry_of(config) as registry:
        there = registry.members()
        prompt = keyed(there, load_secrets(config.secret_file)[0], tokens, namespace)
        found = look_up(registry, prompt.keys, prompt.model.of_chunk, there, prompt.model.needs)
    told = [_told(one, prompt.model.chunk_tokens) for one in found]
    if as_json:
        typer.echo(json_text(told))
        return
    echo(f"{prompt.num_tokens} tokens, {len(prompt.keys)} chunks of {prompt.model.chunk_tokens}")
    for one in told:
        where = ", ".join(f"{count} in {tier}" for tier, count in one["tiers"].items())
        echo(f"{one['node']}: {one['tokens']} tokens; chunks: {where}")
    if not told:
        echo("no node has any of it in tiers of its own")


for _name, _command in commanding.COMMANDS.items():
    app.command(_name)(_command)


def table(found: Sequence[Member]) -> Any:
    """The members for people."""
    from rich.table import Table

    from kvstrata.units import approximate_size

    rows = Table(box=None, pad_edge=False)
    for heading in ("node", "state", "release", "command", "peers", "holds", "models", "clock"):
        rows.add_column(heading, overflow="fold")
    for one in found:
        holds = [
            f"{tier.tier}: shared" if tier.shared else
            f"{tier.tier}: {tier.num_chunks} chunks, {approximate_size(tier.used_bytes)} of "
            f"{approximate_size(tier.capacity_bytes)}"
            for tier in one.tiers
        ]  # fmt: skip
        models = [f"{model.model or '?'} ({model.namespace[:8]})" for model in one.models]
        rows.add_row(
            shown(one.name), shown(one.state), shown(one.release), str(one.seen),
            shown(one.peers or "-"), listed(holds), listed(models or ["-"]),
            f"{1e3 * one.clock_offset_s:+.0f} ms",
        )  # fmt: skip
    return rows


def _told(found: Found, chunk_tokens: int) -> dict[str, Any]:
    tiers = {tier: found.tiers.count(tier) for tier in dict.fromkeys(found.tiers)}
    return {
        "node": found.member.name,
        "peers": found.member.peers,
        "chunks": len(found.tiers),
        "tokens": len(found.tiers) * chunk_tokens,
        "tiers": tiers,
    }
