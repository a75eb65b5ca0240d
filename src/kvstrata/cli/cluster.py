"""``kvstrata cluster``: the fleet by its registry: who is there, who has what, what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.clearing import (
    NamespaceOption,
    OlderOption,
    SaltOption,
    TenantOption,
    before_ns,
    digest,
    owners,
)
from kvstrata.cli.config import ConfigFile, Settings, read_config
from kvstrata.cli.join import fail
from kvstrata.cli.plain import echo, listed, shown
from kvstrata.errors import KVStrataError, TierUnavailable, UsageError

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.fleet.commands import Answers
    from kvstrata.fleet.holdings import Found
    from kvstrata.fleet.members import Member
    from kvstrata.fleet.registry import Registry
    from kvstrata.wire import protocol as p

app = typer.Typer(
    help="The fleet, by its registry: members, lookup, and commands to all of its nodes.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seconds = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for each answer.")
]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="This node alone; may be repeated. Default: all."),
]


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

    config = read_config(config_file, settings or [])
    with _registry(config) as registry:
        found = registry.members()
    if as_json:
        typer.echo(json.dumps(to_builtins(found), indent=2))
        return
    from rich.console import Console

    Console().print(table(found))


@app.command("lookup")
def lookup(
    tokens: Annotated[
        Path, typer.Argument(help="A file with the prompt's token ids as a JSON list; -: stdin.")
    ],
    config_file: ConfigFile = None,
    settings: Settings = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            help="Digest of the namespace, as `kvstrata cluster members --json` shows it. Default: "
            "the one that is in use, if there is only one.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which nodes hold how much of a prompt, and in which of their own tiers.

    The keys are made with the deployment's secret of this machine (`secret_file`).
    """
    from kvstrata.fleet.holdings import lookup as look_up
    from kvstrata.keys import KeyChain
    from kvstrata.secret import load_secrets

    config = read_config(config_file, settings or [])
    ids = _token_ids(tokens)
    with _registry(config) as registry:
        there = registry.members()
        model = _namespace(there, namespace)
        secret = load_secrets(config.secret_file)[0]
        chain = KeyChain(secret, bytes.fromhex(model.namespace), model.chunk_tokens)
        keys = chain.keys(ids)
        found = look_up(registry, keys, range(model.parts), there)
    told = [_told(one, model.chunk_tokens) for one in found]
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    echo(f"{len(ids)} tokens, {len(keys)} chunks of {model.chunk_tokens}")
    for one in told:
        where = ", ".join(f"{count} in {tier}" for tier, count in one["tiers"].items())
        echo(f"{one['node']}: {one['tokens']} tokens; chunks: {where}")
    if not told:
        echo("no node has any of it in tiers of its own")


@app.command("clear")
def clear(
    config_file: ConfigFile = None,
    settings: Settings = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="NAME",
            help="Only this tier, of each node that has it; may be repeated. Default: all.",
        ),
    ] = None,
    tenant: TenantOption = None,
    salt: SaltOption = "",
    namespace: NamespaceOption = None,
    older_than: OlderOption = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal.")
    ] = False,
) -> None:
    """Have every node forget everything that is stored, or what the options say.

    Done when each registered node has confirmed, or its registration has run out; a node that was
    away forgets it before it takes part again. Exit status 1 if one could not, or did not answer.
    """
    from kvstrata.secret import load_secrets
    from kvstrata.wire import protocol as p

    secrets: Sequence[bytes] = ()
    if tenant is not None:
        secrets = load_secrets(read_config(config_file, settings or []).secret_file)
    whose, where, before = owners(secrets, tenant, salt), digest(namespace), before_ns(older_than)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("clear asks first, and here is no terminal to ask on: give --yes")
        typer.confirm("Forget that in the whole fleet?", abort=True)
    for owner in whose:
        request = p.Clear(0, None, list(tiers or ()), owner, where, before)
        _give(config_file, settings, request, timeout_s, only)


@app.command("flush")
def flush(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have every node write to its slower tiers what it has been given so far."""
    from kvstrata.wire import protocol as p

    _give(config_file, settings, p.Flush(0), timeout_s, only)


@app.command("drain")
def drain(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    end_: Annotated[
        bool, typer.Option("--end", help="End each node once it is drained, as for an upgrade.")
    ] = False,
    timeout_s: Seconds = 600.0,
) -> None:
    """Have the nodes take no more stores and write what is left, one node after the other.

    The next one begins when the one before has nothing left to write, and only if that went well.
    `undrain` has them take stores again.
    """
    from kvstrata.wire import operating as o

    _in_turn(config_file, settings, o.Drain(0, end_), timeout_s, only)


@app.command("undrain")
def undrain(
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 60.0,
) -> None:
    """Have nodes that are drained take stores again."""
    from kvstrata.wire import operating as o

    _give(config_file, settings, o.Undrain(0), timeout_s, only)


@app.command("scrub")
def scrub(
    tier: Annotated[str, typer.Argument(help="A tier that each node owns, such as disk.")],
    config_file: ConfigFile = None,
    settings: Settings = None,
    only: Nodes = None,
    timeout_s: Seconds = 3600.0,
) -> None:
    """Have every node verify all that one of its tiers holds, one node after the other."""
    from kvstrata.wire import operating as o

    _in_turn(config_file, settings, o.Scrub(0, tier), timeout_s, only)


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


class _registry:
    """The configured registry; one that does not answer ends the command with exit status 1."""

    def __init__(self, config: Config) -> None:
        from kvstrata.fleet.registry import Registry

        self._registry = Registry.of(config)

    def __enter__(self) -> Registry:
        return self._registry

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._registry.close()
        if isinstance(error, TierUnavailable):
            fail(error)


def _give(
    config_file: Path | None,
    settings: list[str] | None,
    request: p.Request,
    timeout_s: float,
    only: list[str] | None,
) -> None:
    """Give a command, print each answer as it comes, and end with exit status 1 if not all did."""
    from kvstrata.fleet import commands

    with _registry(read_config(config_file, settings or [])) as registry:
        posted = commands.post(registry, request, timeout_s, only or ())
        answers = commands.wait(registry, posted, timeout_s, say)
    end(answers)


def _in_turn(
    config_file: Path | None,
    settings: list[str] | None,
    request: p.Request,
    timeout_s: float,
    only: list[str] | None,
) -> None:
    """The same, one node after the other."""
    from kvstrata.fleet import commands

    with _registry(read_config(config_file, settings or [])) as registry:
        answers = commands.one_by_one(registry, request, timeout_s, say, only or ())
    end(answers)


def say(name: str, reply: p.Reply) -> None:
    """Print one node's answer."""
    from kvstrata.wire import operating as o
    from kvstrata.wire import protocol as p

    match reply:
        case p.Failed():
            echo(f"{name}: {reply.kind}: {reply.message}")
        case p.Done(count=count):
            echo(f"{name}: done, {count} objects")
        case o.JobPage(jobs=[job, *_]):
            failed = f", {job.failed} failed" if job.failed else ""
            echo(f"{name}: done, {job.done} of {job.total}{failed}")
        case _:
            echo(f"{name}: done")


def end(answers: Answers) -> None:
    """Print who is missing; exit status 1 if the command is not done."""
    for name in answers.gone:
        echo(f"{name}: gone; it does it when it comes back, before it takes part")
    for name in answers.silent:
        echo(f"{name}: no answer in time")
    if not answers.answered and not answers.gone and not answers.silent:
        echo("no node is registered; one that comes does it first")
    if not answers.done:
        raise typer.Exit(1)


def _token_ids(file: Path) -> list[int]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        ids = json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"no token ids in {file}: {error}") from error
    if not isinstance(ids, list):
        raise UsageError(f"{file} holds no JSON list")
    return ids


def _namespace(there: Sequence[Member], wanted: str | None) -> Any:
    known = {model.namespace: model for member in there for model in member.models}
    if wanted is not None:
        if wanted not in known:
            raise UsageError(f"no node knows the namespace {wanted}; there are {sorted(known)}")
        return known[wanted]
    if len(known) != 1:
        raise KVStrataError(
            f"{len(known)} namespaces are in use: name one with --namespace: {sorted(known)}"
            if known
            else "no engine has told a node of its namespace yet"
        )
    return next(iter(known.values()))


def _told(found: Found, chunk_tokens: int) -> dict[str, Any]:
    tiers = {tier: found.tiers.count(tier) for tier in dict.fromkeys(found.tiers)}
    return {
        "node": found.member.name,
        "peers": found.member.peers,
        "chunks": len(found.tiers),
        "tokens": len(found.tiers) * chunk_tokens,
        "tiers": tiers,
    }
