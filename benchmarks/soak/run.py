"""Do a node and its API stay as they are under an hour of everything?"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from benchmarks.common import Options, Row, disk_folder, expect, main, say
from benchmarks.soak.documents import Documents, tokens_of
from benchmarks.soak.driving import Driver, Engine, Settings
from benchmarks.soak.operating import Operator, scrubbed
from benchmarks.soak.serving import EVERY_S as CHECK_EVERY_S

from kvstrata.cli.counting import total
from kvstrata.config import load_config
from kvstrata.control.client import Client
from kvstrata.testing.engine import engine_environment
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect

NAME = "soak"
SECONDS, QUICK_SECONDS = 3600, 60
TENANTS = ("a", "a", "b")
"""Of each engine."""
OPERATORS = 2
EVERY_S = 5.0
REST_S = 60.0
MOST = 1.05
MORE_THREADS = 8
"""Pools of threads grow as far as calls coincide, which may come late."""
NEVER = ("bugs_total", "corrupt_objects_total", "disconnects_total", "incompatible_objects_total")


class Held(NamedTuple):
    """What a process holds: MiB of memory of its own, descriptors, threads, children."""

    mib: float
    files: int
    threads: int
    children: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.partition("RssAnon:")[2].split()[0])
        threads = int(status.partition("Threads:")[2].split()[0])
        return cls(resident / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads, len(children(pid)))


class Seen(NamedTuple):
    """At one moment: what both processes hold, and what engines asked and loaded so far."""

    node: Held
    api: Held
    asked: int
    loaded: int


class Told:
    """What the node's process says, read by a thread of its own."""

    def __init__(self, lines: IO[str]) -> None:
        self.num_checks = 0
        self.url = ""
        self.serves = threading.Event()
        self._lines = lines
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._lines:
            if line.startswith("checked "):
                self.num_checks = int(line.split()[1])
            elif line.startswith("API on "):
                self.url = line.removeprefix("API on ").strip()
                self.serves.set()


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], Told]]:
    """A node with its API."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.soak.serving"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=engine_environment({}),
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(settings))
        process.stdin.close()
        told = Told(process.stdout)
        expect(told.serves.wait(60.0), "the node did not start")
        yield process, told
    finally:
        process.terminate()
        process.wait()


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # that thread has ended
            found += [int(one) for one in (task / "children").read_text().split()]
    return found


def api_of(pid: int) -> int:
    """The process of a node's API."""
    (found,) = [
        child
        for child in children(pid)
        if b"kvstrata.control.run" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return found


def until(true: Callable[[], bool], message: str) -> None:
    """Wait for something that has to come to be."""
    end = time.monotonic() + REST_S
    while not true():
        expect(time.monotonic() < end, message)
        time.sleep(0.2)


def measure(options: Options) -> list[Row]:
    """All rows."""
    seconds = QUICK_SECONDS if options.quick else SECONDS
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        disk = tempfile.mkdtemp(dir=ends.enter_context(disk_folder(options)))
        settings = {
            "node": f"unix:{folder}/node.sock",
            "secret_file": str(folder / "secret"),
            "host.capacity": "64MiB",
            "disk.path": disk,
            "disk.capacity": "128MiB",
            "disk.codec": "lossless",
            "pins.per_tenant": "10%",
            "api.listen": "127.0.0.1:0",
        }
        process, told = ends.enter_context(serving(settings))
        client = connect(load_config(environ={}, overrides=settings))
        ends.callback(client.close)
        tokens = tokens_of(options.seed)
        tenants = {name: Documents(client.hello.secret, tokens, name) for name in set(TENANTS)}
        api = api_of(process.pid)
        ending = threading.Event()
        engines = [
            Engine(settings, tenants[tenant], number, ending)
            for number, tenant in enumerate(TENANTS, 1)
        ]
        operators = [
            Operator(told.url, list(tenants.values()), number, ending)
            for number in range(OPERATORS)
        ]
        drivers: list[Driver] = [*engines, *operators]
        for one in drivers:
            one.start()
        seen: list[Seen] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end and not ending.wait(EVERY_S):
            expect(process.poll() is None, "the node ended: a law is broken, or a bug was hit")
            expect(api in children(process.pid), "the API ended")
            asked = sum(engine.asked for engine in engines)
            loaded = sum(engine.came.total() for engine in engines)
            seen.append(Seen(Held.by(process.pid), Held.by(api), asked, loaded))
            if len(seen) % 60 == 0:
                say(f"{len(seen) * EVERY_S:.0f} s: node {seen[-1].node}, API {seen[-1].api}")
        ending.set()
        for one in drivers:
            one.join(120.0)
            expect(not one.is_alive() and not one.wrong, one.wrong or f"{one.name} hangs")
        done, refused, came = Counter[str](), Counter[str](), Counter[str]()
        for one in drivers:
            done += one.done
            refused += one.refused
        for engine in engines:
            came += engine.came
        say(f"done: {dict(done.most_common())}")
        say(f"loaded and compared: {dict(came)}")
        say(f"refused: {dict(refused.most_common(12))}")
        never = [name for name in ("left", "killed", *operators[0].verbs) if not done[name]]
        expect(not never, f"what was never done: {never}")
        at_rest(client, told.url, settings, tenants["b"])
        expect(process.poll() is None, "the node ended")
        return rows(seen, done, came, told.num_checks * CHECK_EVERY_S / seconds)


def at_rest(client: NodeClient, url: str, settings: Settings, documents: Documents) -> None:
    """Nothing is left of whoever has gone, all that is held is whole, and there is room again."""

    def state() -> dict[str, Any]:
        return client.status()

    until(
        lambda: not state()["leases"]["count"] and not state()["leases"]["reservations"],
        "leases or reservations of those who have gone are left",
    )
    with Client(url) as operator:
        until(lambda: all(job.state != "running" for job in operator.jobs().jobs), "a job hangs")
        operator.undrain()
        operator.flush()
        for tier in ("host", "disk"):
            say(f"{scrubbed(operator, tier)} objects in {tier} are whole")
        operator.clear(everything=True)
    until(lambda: state()["host"]["num_chunks"] == 0, "chunks are left after a clear of everything")
    engine = Engine(settings, documents, 99, threading.Event())
    try:
        longest = max(range(len(documents.keys)), key=lambda number: len(documents.keys[number]))
        for _ in range(2):
            engine.prompt(longest)
        expect(engine.came["host"] > 0, "what was stored at the end did not come back")
    finally:
        engine.close()
    counters = state()["counters"]
    found = {name: total(counters, name) for name in NEVER if total(counters, name)}
    expect(not found, f"what must never be counted: {found}")


def rows(seen: Sequence[Seen], done: Counter[str], came: Counter[str], checked: float) -> list[Row]:
    """What was seen as rows: the last quarter beside the second one."""
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[3 * quarter :]
    found = []
    for who in ("node", "api"):
        before, after = ([getattr(one, who) for one in some] for some in (early, late))
        mib, mib_late = (float(np.median([one.mib for one in some])) for some in (before, after))
        detail = f"{mib:.1f} MiB in the second quarter, {mib_late:.1f} MiB in the last"
        found.append(Row(NAME, f"memory of {who}, last quarter / second", mib_late / mib, MOST,
                         detail=detail))  # fmt: skip
        for what, most in (("files", 0), ("threads", MORE_THREADS), ("children", 0)):
            first, last = (min(getattr(one, what) for one in some) for some in (before, after))
            name = "descriptors" if what == "files" else what
            detail = f"{first} in the second quarter, {last} in the last"
            found.append(Row(NAME, f"{name} of {who}, more", last - first, most, detail=detail))
    share, share_late = hits(early), hits(late)
    compared = f"{share:.2f} in the second quarter, {share_late:.2f} in the last"
    others = f"{done['prompts']} prompts, {done.total() - done['prompts']} other things"
    found += [
        Row(NAME, "hits of what was asked, last quarter / second",
            share_late / share if share else float("nan"), 0.5, at_most=False, detail=compared),
        *(Row(NAME, f"chunks from {tier} that were compared", came[tier], 1, at_most=False)
          for tier in ("host", "disk")),
        Row(NAME, "checks of the node's laws that held, of those that were due", checked, 0.5,
            at_most=False, detail=others),
    ]  # fmt: skip
    return found


def hits(seen: Sequence[Seen]) -> float:
    """Share of the chunks that were asked for within this time and came."""
    first, last = seen[0], seen[-1]
    return (last.loaded - first.loaded) / max(1, last.asked - first.asked)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
