"""``kvstrata doctor``: try everything that a request needs, and say in words what is wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.counting import total
from kvstrata.cli.join import NodeOption, configured, join, join_or_exit
from kvstrata.errors import ConfigError
from kvstrata.units import approximate_size

if TYPE_CHECKING:
    from kvstrata.cli.canary import Canary, Step
    from kvstrata.cli.checks import Check
    from kvstrata.config import Config
    from kvstrata.secret import Secrets
    from kvstrata.wire.client import NodeClient

COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "FAIL": typer.colors.RED}
NUM_CHUNKS = 16
MAX_PAYLOAD_BYTES = 4 << 20
HEADER_BYTES = 4096
SLOW_ROUND_TRIP_S = 2e-3
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
            typer.echo(f"{result} {check.name + ':':13} {' '.join(check.message.split())}")
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
        typer.echo(json.dumps({"ok": not bad, "checks": lines}, indent=2))
    elif bad:
        typer.echo(f"{len(bad)} of {len(checks)} checks failed; the page Troubleshooting goes on")
    else:
        num_warnings = sum(check.result == "warn" for check in checks)
        typer.echo(f"KVStrata works{f'; {num_warnings} warnings' if num_warnings else ''}")
    if bad:
        raise typer.Exit(1)


def examine(config: Config) -> Iterator[Check]:
    """All checks of the node that this configuration names, in order."""
    from kvstrata.cli import checks
    from kvstrata.config import DiskConfig
    from kvstrata.errors import KVStrataError
    from kvstrata.memory.machine import available_bytes
    from kvstrata.wire.sockets import socket_path

    yield checks.check_vllm(checks.installed_vllm())
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
            tiers = {tier["name"]: tier for tier in state["tiers"]}
            yield from map(checks.check_tier, tiers.values())
            for name, why in state["tiers_left_out"].items():
                yield checks.check_left_out(name, why)
            for part in config.tiers:
                if part.name in tiers and isinstance(part, DiskConfig):
                    yield checks.check_folder(part, tiers[part.name]["used_bytes"])
                elif part.name not in {*tiers, *state["tiers_left_out"]}:
                    yield checks.Check(
                        part.name,
                        "warn",
                        f"this configuration names a {part.name} tier, but the node was started "
                        "without one; start it with this configuration, or give doctor the node's "
                        "own --config",
                    )
            yield from check_peers(config, tuple(client.hello.secrets))
            yield from round_trip(client, config)
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


def round_trip(client: NodeClient, config: Config) -> Iterator[Check]:
    """Store a canary, read it back through every tier, compare, and forget it.

    Stops between its steps, so that a test can break something in between.
    """
    from kvstrata.cli.canary import Canary
    from kvstrata.cli.checks import Check, check_tier

    before = client.status()
    numbers = {tier["name"]: number for number, tier in enumerate(before["tiers"], 1)}
    populating = before["host"]["populated_bytes"] < before["host"]["capacity_bytes"]
    num_chunks, payload_bytes = canary_size(before, config)
    with closing(Canary(client, num_chunks, payload_bytes, config.deadlines.load)) as canary:

        def judge(name: str, tier: str, step: Step, what: str) -> Check:
            if step.problem:
                result, why = diagnose(before, client.status(), tier)
                return Check(name, result, f"{step.problem}: {why}")
            speed = canary.nbytes / 1e9 / max(step.seconds[what], 1e-9)
            message = f"{num_chunks} chunks of {approximate_size(payload_bytes)}, {speed:.1f} GB/s"
            if name == "host write" and populating:
                message += "; faster once the whole pool is faulted in"
            return Check(name, "ok", message, {"gb_per_s": round(speed, 3)})

        yield _round_trip_check(canary.round_trip())
        stored = canary.store()
        yield judge("host write", "host", stored, "copy")
        if stored.problem:
            return
        written = canary.write_behind()  # at once, since the node has begun already
        names = ["host"]
        for tier, earlier in zip(client.status()["tiers"], before["tiers"], strict=True):
            if _takes_writes(tier):
                names.append(tier["name"])
            elif tier["state"] != earlier["state"]:  # its first write has been refused by now
                yield check_tier(tier)
        yield judge("host read", "host", canary.read_back(), "copy")
        for place, name in enumerate(names[1:], 1):
            canary.drop(names[:place])
            if missing := sum(where != numbers[name] for where in canary.where()):
                written.problem = (
                    written.problem or f"{missing} of {num_chunks} chunks did not get there"
                )
            yield judge(f"{name} write", name, written, "flush")
            if missing:
                break
            yield judge(f"{name} read", name, canary.read_back(), "arrive")
        yield _clean_up(canary, names)


def settled(client: NodeClient) -> dict[str, Any]:
    """A node's state, once its stores have had time for their first answer."""
    deadline = time.monotonic() + FIRST_ANSWER_S
    while True:
        state = client.status()
        waiting = any(tier["state"].startswith("waiting") for tier in state["tiers"])
        if not waiting or time.monotonic() > deadline:
            return state
        time.sleep(0.05)


def canary_size(state: Mapping[str, Any], config: Config) -> tuple[int, int]:
    """How many chunks, and bytes of payload in each, fit without crowding anybody out."""
    capacity = state["host"]["capacity_bytes"]
    room = min(capacity // 4, int(config.leases.per_client * capacity))
    for tier in state["tiers"]:
        room = min(room, tier.get("capacity_bytes", room * 4) // 4)
    for part in config.tiers:
        room = min(room, part.write_queue // 2 or room)
    each = min(MAX_PAYLOAD_BYTES, room // NUM_CHUNKS) // HEADER_BYTES * HEADER_BYTES
    return NUM_CHUNKS, max(HEADER_BYTES, each - HEADER_BYTES)


def _takes_writes(tier: Mapping[str, Any]) -> bool:
    """Whether a canary may go through it: not where the node has been told that it only reads."""
    only_read = tier.get("shared") and tier["state"].startswith("read only")
    return bool(tier.get("written", True)) and not only_read


def diagnose(
    before: Mapping[str, Any], after: Mapping[str, Any], tier: str
) -> tuple[Literal["warn", "FAIL"], str]:
    """Why a step of the canary failed, from what a node's status says before and after it.

    What merely comes of a busy node is a warning.
    """

    def rose(name: str, *values: str) -> int:
        counts = [total(state["counters"], name, *values) for state in (before, after)]
        return int(counts[1] - counts[0])

    state = next((t["state"] for t in after["tiers"] if t["name"] == tier), "ok")
    if corrupt := rose("corrupt_objects_total", tier):
        return "FAIL", (
            f"{corrupt} failed their checksum, so the {tier} tier did not keep the bytes that it "
            "was given (a failing drive, bad memory, or somebody changed its files); the node "
            "drops such objects and engines compute instead"
        )
    if state == "scanning":
        return "warn", (
            f"the {tier} tier still scans what earlier nodes left, and takes no writes before the "
            "end of that; try again"
        )
    if state != "ok":
        return "FAIL", f"the {tier} tier is {state}"
    if rose("tier_trips_total", tier):
        return "FAIL", f"the {tier} tier met an error, and is left alone for a while"
    if failed := rose("tier_writes_total", tier, "failed"):
        return "FAIL", f"{failed} writes failed; the node's log may say more"
    if failed := rose("tier_reads_total", tier, "failed"):
        return "FAIL", f"{failed} reads failed; the node's log may say more"
    if rose("tier_reads_total", tier, "miss"):
        return "FAIL", f"somebody removed them from the {tier} tier"
    if rose("write_behind_skipped_total", tier, "queue"):
        return "warn", (
            "the write queue is full, since engines store faster than the tier writes; a larger "
            "disk.write_queue helps against bursts only"
        )
    if rose("matches_cut_total") or after["leases"]["bytes"] > after["host"]["capacity_bytes"] // 2:
        return "warn", "too much of the pool is leased by loads; try again, or raise host.capacity"
    if (after["host"]["num_evicted"] > before["host"]["num_evicted"]) or rose(
        "evicted_chunks_total", tier
    ):
        return "warn", "engines stored so much meanwhile that these were evicted; try again"
    return "FAIL", "no counter tells why; the node's log may"


def _clean_up(canary: Canary, tiers: Sequence[str]) -> Check:
    from kvstrata.cli.canary import ABSENT
    from kvstrata.cli.checks import Check
    from kvstrata.errors import DeadlineExceeded, TierUnavailable

    try:
        count = canary.drop(tiers)
    except (TierUnavailable, DeadlineExceeded) as error:
        message = f"some objects of this test stay until they are evicted: {error}"
        return Check("clean up", "warn", message)
    if left := sum(where != ABSENT for where in canary.where()):
        return Check("clean up", "FAIL", f"{left} chunks are still found after a clear")
    return Check("clean up", "ok", f"forgot the {count} objects of this test")


def _round_trip_check(step: Step) -> Check:
    from kvstrata.cli.checks import Check

    median, p99 = step.seconds["median"], step.seconds["p99"]
    measured = {"median_ms": round(median * 1e3, 4), "p99_ms": round(p99 * 1e3, 4)}
    message = f"{median * 1e3:.2f} ms median, {p99 * 1e3:.2f} ms p99, of a message and its answer"
    if median > SLOW_ROUND_TRIP_S:
        return Check(
            "round trip",
            "warn",
            f"{message}: slow. The node gets too little of the processor; leave it a core",
            measured,
        )
    return Check("round trip", "ok", message, measured)
