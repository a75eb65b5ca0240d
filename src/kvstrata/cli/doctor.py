"""``kvstrata doctor``: try everything that a request needs, and say in words what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, join, join_or_exit
from kvstrata.cli.plain import echo, json_text, plain
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.cli.checks import Check
    from kvstrata.config import Config
    from kvstrata.secret import Secrets
    from kvstrata.wire.client import NodeClient

COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "FAIL": typer.colors.RED}
FIRST_ANSWER_S = 3.0


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="HOST:PORT",
            help="Try only this other node, and need none here; may be repeated.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="STATUS.json",
            help="Compare only, with another node's `kvstrata status --json`.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find out what is wrong: check, store, look up, read back through every tier, and compare.

    Joins the configured node, or starts it on demand and says so. Stores some chunks of random
    bytes that no request can hit, measures what each tier does with them, and forgets them again.
    Safe beside running engines. For a service give the service's own --config, so that its disk
    folder can be looked at too. Every configured peer is tried as well.

    Why two nodes do not share what they should: --peer looks at the network, the secret, the
    release and the clock; --against at secret, stores and namespaces, part by part.

    Each line is ok, warn or FAIL. Exit status 1 if any line is FAIL.
    """
    config = configured(config_file, settings, node)
    checks: list[Check] = []
    for check in examine_fleet(config, peer or [], against) if peer or against else examine(config):
        checks.append(check)
        if not as_json:
            result = typer.style(f"{check.result:5}", fg=COLOURS[check.result])
            words = plain(" ".join(check.message.split()))
            typer.echo(f"{result} {plain(check.name) + ':':13} {words}")
    bad = [check for check in checks if check.result == "FAIL"]
    if as_json:
        lines = [
            {
                "name": check.name,
                "result": check.result,
                "message": check.message,
                "measured": dict(check.measured),
            }
            for check in checks
        ]
        typer.echo(json_text({"ok": not bad, "checks": lines}))
    elif bad:
        echo(f"{len(bad)} of {len(checks)} checks failed; the page Troubleshooting goes on")
    else:
        num_warnings = sum(check.result == "warn" for check in checks)
        echo(f"KVStrata works{f'; {num_warnings} warnings' if num_warnings else ''}")
    if bad:
        raise typer.Exit(1)


def examine(config: Config) -> Iterator[Check]:
    """All checks of the node that this configuration names, in order."""
    from kvstrata.cli import checks, machine
    from kvstrata.cli.engines import check_engines
    from kvstrata.cli.round_trip import round_trip
    from kvstrata.cli.services import check_services
    from kvstrata.config import DiskConfig
    from kvstrata.errors import KVStrataError
    from kvstrata.memory.machine import available_bytes
    from kvstrata.wire.sockets import socket_path

    yield from check_engines()
    try:
        path = socket_path(config)
    except KVStrataError as error:
        yield checks.Check("socket", "FAIL", str(error))
        return
    try:
        client, how = attach(config)
    except KVStrataError as error:
        yield checks.check_secret(config, None)
        yield checks.Check("node", "FAIL", str(error))
        if os.path.lexists(path):
            yield checks.check_socket(path)
        return
    with closing(client):
        yield checks.Check("node", "ok", how)
        yield checks.check_release(client.hello)
        yield checks.check_secret(config, client.hello)
        yield checks.check_socket(path)
        try:
            state = settled(client)
            yield checks.check_past(state["counters"])
            yield checks.check_host(state, available_bytes())
            yield machine.check_huge_pages()
            capacity = state["host"]["capacity_bytes"]
            yield from machine.check_limits(client.hello.pid, config, capacity)
            tiers = {tier["name"]: tier for tier in state["tiers"]}
            yield from map(checks.check_tier, tiers.values())
            for name, why in state["tiers_left_out"].items():
                yield checks.check_left_out(name, why)
            for part in config.tiers:
                if part.name in tiers and isinstance(part, DiskConfig):
                    yield checks.check_folder(part, tiers[part.name]["used_bytes"])
                    if not checks.folder_trouble(part.path):
                        yield machine.check_drive(part.path)
                        yield machine.check_quarantine(part.path)
                elif part.name not in {*tiers, *state["tiers_left_out"]}:
                    yield checks.Check(
                        part.name,
                        "warn",
                        f"this configuration names a {part.name} tier, but the node was started "
                        "without one; start it with this configuration, or give doctor the node's "
                        "own --config",
                    )
            yield from check_peers(config, tuple(client.hello.secrets))
            yield from check_services(config, state)
            yield from round_trip(client, config, state)
        except KVStrataError as error:
            yield checks.Check("round trip", "FAIL", f"{error} ({type(error).__name__})")


def examine_fleet(config: Config, peers: Sequence[str], against: Path | None) -> Iterator[Check]:
    """The checks between this node and others; one here is needed for the comparison alone.

    Raises:
        ConfigError: an address or a file is none.
    """
    from kvstrata.cli import fleet
    from kvstrata.cli.checks import Check
    from kvstrata.config.network import NODES
    from kvstrata.secret import load_secrets, secret_check

    if peers:
        try:
            nodes = NODES.parse(list(peers))
        except ValueError as error:
            raise ConfigError("--peer", f"{error}; expected {NODES.expected}") from error
        if not config.secret_file.exists():
            missing = "is not there; copy the deployment's secret_file here"
            yield Check("secret", "FAIL", f"{config.secret_file} {missing}")
        else:
            known, tls = load_secrets(config.secret_file), config.network.tls(serving=False)
            for node in nodes:
                yield fleet.check_peer(node, known, tls)
    if against is not None:
        there = fleet.read_status(against)
        with closing(join_or_exit(config)) as client:
            state = settled(client)
            state["secret_checks"] = [secret_check(one) for one in client.hello.secrets]
        yield from fleet.compare(fleet.status_of(state), there)


def check_peers(config: Config, known: Secrets) -> Iterator[Check]:
    """Every other node that the configuration names."""
    from kvstrata.cli import fleet
    from kvstrata.config.network import PeerConfig

    for part in config.tiers:
        if isinstance(part, PeerConfig):
            tls = config.network.tls(serving=False)
            for node in part.addresses:
                yield fleet.check_peer(node, known, tls)


def attach(config: Config) -> tuple[NodeClient, str]:
    """A client of the configured node, and in words how it was come by.

    Raises:
        KVStrataError: as `kvstrata.wire.launch.connect`.
    """
    from kvstrata.errors import NodeUnavailable
    from kvstrata.wire.launch import connect
    from kvstrata.wire.sockets import beside, socket_path

    try:
        client = join(config)
    except NodeUnavailable:
        if config.node != "auto":
            raise
        client = connect(config)
        return client, (
            f"none ran with this configuration: started one on demand, pid {client.hello.pid}; it "
            f"ends {config.linger:g} s after its last client, log in "
            f"{beside(socket_path(config), '.log')}"
        )
    return client, f"joined pid {client.hello.pid}"


def settled(client: NodeClient) -> dict[str, Any]:
    """A node's state, once its stores have had time for their first answer."""
    deadline = time.monotonic() + FIRST_ANSWER_S
    while True:
        state = client.status()
        waiting = any(tier["state"].startswith("waiting") for tier in state["tiers"])
        if not waiting or time.monotonic() > deadline:
            return state
        time.sleep(0.05)
