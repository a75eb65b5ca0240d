"""``kvstrata status``: what a running node holds, how it hits, and what troubles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.counting import label_values, labelled, total, troubles
from kvstrata.cli.join import NodeOption, configured, fail, join_or_exit
from kvstrata.cli.plain import json_text, shown
from kvstrata.errors import DeadlineExceeded, NodeUnavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_REQUESTS = 8

#: columns of the last requests: heading and field of a request's record
REQUEST_COLUMNS: Mapping[str, str] = {
    "request": "request",
    "outcome": "outcome",
    "prompt": "prompt_tokens",
    "engine": "local_tokens",
    "host": "host_tokens",
    "slower": "slower_tokens",
    "load": "load",
    "s": "seconds",
    "why missed": "miss",
}


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show a running node: memory, leases, tiers, hits and misses, the last requests.

    It never starts a node. Exit status 1 and one line on stderr if none answers.
    """
    from kvstrata.secret import secret_check
    from kvstrata.wire.sockets import socket_path

    config = configured(config_file, settings, node)
    client = join_or_exit(config)
    try:
        state = {
            "socket": str(socket_path(config)),
            "secret_checks": [secret_check(one) for one in client.hello.secrets],
            **client.status(),
        }
    except (NodeUnavailable, DeadlineExceeded) as error:
        fail(error)
    finally:
        client.close()
    if as_json:
        typer.echo(json_text(state))
        return
    from rich.console import Console

    console = Console()
    for part in render(state):
        console.print(part)


def render(state: Mapping[str, Any]) -> list[RenderableType]:
    """The answer of `NodeClient.status` for people, part by part."""
    from rich.table import Table

    from kvstrata.units import approximate_size

    parts: list[RenderableType] = [
        shown(
            f"KVStrata {state['release']} · pid {state['pid']} · up {_age(state['uptime_s'])} · "
            f"unix:{state['socket']}"
        ),
        shown(_secrets(state["secret_checks"])),
    ]
    if state["draining"] != "no":
        words = "drained: it takes no stores until `kvstrata drain --undo`"
        if state["draining"] == "ending":
            words = "draining: it takes no stores, and ends when all is written"
        parts.append(shown(words, style="yellow"))
    host, leases = state["host"], state["leases"]
    tiers = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("tier", "used", "of", "chunks", "objects"):
        tiers.add_column(column, justify="left" if column == "tier" else "right", no_wrap=True)
    tiers.add_column("codec")
    tiers.add_column("state")
    populated, capacity = host["populated_bytes"], host["capacity_bytes"]
    tiers.add_row(
        "host",
        approximate_size(host["allocated_bytes"]),
        approximate_size(capacity),
        str(host["num_chunks"]),
        str(host["num_objects"]),
        "raw",
        "ok" if populated >= capacity else f"ok, {populated / capacity:.0%} of it faulted in",
    )
    for tier in state["tiers"]:
        waiting = tier["queued_bytes"]
        held = (
            ["", "the fleet's", "", ""]
            if tier.get("shared")
            else [
                approximate_size(tier["used_bytes"]),
                approximate_size(tier["capacity_bytes"]),
                str(tier["num_chunks"]),
                str(tier["num_objects"]),
            ]
        )
        tiers.add_row(
            shown(tier["name"]),
            *held,
            shown(tier["codec"]),
            shown(tier["state"] + (f", {approximate_size(waiting)} to write" if waiting else "")),
        )
    for name, why in state["tiers_left_out"].items():
        off = shown(f"off since the node started: {why}")
        tiers.add_row(shown(name), "", "", "", "", "", off)
    parts.append(tiers)
    parts.append(
        shown(
            f"leases: {leases['count']} hold {approximate_size(leases['bytes'])} still · "
            f"writing: {leases['reservations']} · evicted from host: {host['num_evicted']}"
        )
    )
    parts.append(shown(_hits(state["counters"])))
    parts += [shown(f"trouble: {words}", style="yellow") for words in troubles(state["counters"])]
    parts += [shown(_namespace(one)) for one in state["namespaces"]]
    if state["requests"]:
        parts.append(_requests(state["requests"][-SHOWN_REQUESTS:]))
    return parts


def _secrets(checks: Sequence[str]) -> str:
    used, *others = checks
    return f"secret: {used}" + "".join(f", and {one} is looked up, too" for one in others)


def _hits(counters: Mapping[str, float]) -> str:
    hits = labelled(counters, "hit_chunks_total")
    hit, missed = sum(hits.values()), total(counters, "missed_chunks_total")
    if not hit + missed:
        return "chunks asked for: none yet"
    by_tier = ", ".join(f"{label_values(labels)[0]} {value:.0f}" for labels, value in hits.items())
    return (
        f"chunks asked for: {hit + missed:.0f} in {total(counters, 'matches_total'):.0f} matches · "
        f"hit: {hit:.0f} ({hit / (hit + missed):.0%})"
        + (f": {by_tier}" if by_tier else "")
        + f" · missed: {missed:.0f} · objects stored: {total(counters, 'stored_objects_total'):.0f}"
    )


def _namespace(one: Mapping[str, Any]) -> str:
    parts = one["parts"]
    return (
        f"namespace {one['digest'][:12]}: {one['model'].get('name', 'a model')}, chunks of "
        f"{parts['chunk_tokens']} tokens, tenant {parts['tenant'] or 'none'}"
    )


def _requests(records: list[Mapping[str, Any]]) -> RenderableType:
    from rich.table import Table

    title = "last requests (prompt tokens; of them from the engine's own cache, host, slower tiers)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in REQUEST_COLUMNS:
        table.add_column(heading, max_width=16 if heading == "request" else None)
    for record in records:
        table.add_row(*(shown(_value(record.get(name, ""))) for name in REQUEST_COLUMNS.values()))
    return table


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h" if hours < 48 else f"{hours // 24} d"
