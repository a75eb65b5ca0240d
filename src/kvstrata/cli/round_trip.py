"""The doctor's canary: stored, read back through every tier, compared, and why a step failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from kvstrata.cli.canary import ABSENT, Canary, Step
from kvstrata.cli.checks import Check, check_tier
from kvstrata.cli.counting import total
from kvstrata.errors import DeadlineExceeded, TierUnavailable
from kvstrata.units import approximate_size

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.wire.client import NodeClient

NUM_CHUNKS = 16
MAX_PAYLOAD_BYTES = 4 << 20
HEADER_BYTES = 4096
SLOW_ROUND_TRIP_S = 2e-3


def round_trip(
    client: NodeClient, config: Config, told: Mapping[str, Any] | None = None
) -> Iterator[Check]:
    """Store a canary, read it back through every tier, compare, and forget it.

    Stops between its steps, so that a test can break something in between.

    Args:
        client: of the node.
        config: as the node's.
        told: the status that checks were made of before this; a tier that has changed since is
            told of anew. None: none were.
    """
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
        for tier, earlier in zip(client.status()["tiers"], (told or before)["tiers"], strict=True):
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

    now: Mapping[str, Any] = next((t for t in after["tiers"] if t["name"] == tier), {})
    state = now.get("state", "ok")
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
    if queued := now.get("queued_bytes", 0):
        return "warn", (
            f"{approximate_size(queued)} still wait to be written to the {tier} tier: it is slow, "
            "or the machine is busy; try again"
        )
    return "FAIL", "no counter tells why; the node's log may"


def _clean_up(canary: Canary, tiers: Sequence[str]) -> Check:
    try:
        count = canary.drop(tiers)
    except (TierUnavailable, DeadlineExceeded) as error:
        message = f"some objects of this test stay until they are evicted: {error}"
        return Check("clean up", "warn", message)
    if left := sum(where != ABSENT for where in canary.where()):
        return Check("clean up", "FAIL", f"{left} chunks are still found after a clear")
    return Check("clean up", "ok", f"forgot the {count} objects of this test")


def _round_trip_check(step: Step) -> Check:
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
