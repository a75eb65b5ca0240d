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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from benchmarks.common import Options, Row, disk_folder, expect, main, say
from benchmarks.soak.driving import Documents, Driver, Engine, Operator, Settings

from kvstrata.config import load_config
from kvstrata.testing.engine import engine_environment
from kvstrata.wire.launch import connect

NAME = "soak"
SECONDS, QUICK_SECONDS = 3600, 60
ENGINES, OPERATORS = 3, 2
EVERY_S = 5.0
MOST = 1.05


class Held(NamedTuple):
    """What a process holds: MiB of memory of its own, and descriptors."""

    mib: float
    files: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.partition("RssAnon:")[2].split()[0])
        return cls(resident / 1024, len(os.listdir(f"/proc/{pid}/fd")))


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
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
        documents = Documents(client.hello.secret, options.seed)
        (api,) = children(process.pid)
        ending = threading.Event()
        drivers: list[Driver] = [
            *(Engine(settings, documents, 1 + number, ending) for number in range(ENGINES)),
            *(Operator(told.url, documents, number, ending) for number in range(OPERATORS)),
        ]
        for one in drivers:
            one.start()
        seen: list[tuple[Held, Held]] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end and not ending.wait(EVERY_S):
            expect(process.poll() is None, "the node ended: a law is broken, or a bug was hit")
            seen.append((Held.by(process.pid), Held.by(api)))
            if len(seen) % 60 == 0:
                say(f"{len(seen) * EVERY_S:.0f} s: node {seen[-1][0]}, API {seen[-1][1]}")
        ending.set()
        for one in drivers:
            one.join(120.0)
            expect(not one.is_alive() and not one.wrong, one.wrong or f"{one.name} hangs")
        counters = client.status()["counters"]
        expect(process.poll() is None, "the node ended")
        bugs = [name for name in counters if name.startswith("bugs_")]
        expect(not bugs, f"bugs were hit: {bugs}")
        done, refused = Counter[str](), Counter[str]()
        for one in drivers:
            done += one.done
            refused += one.refused
        say(f"done: {dict(done.most_common())}")
        say(f"refused: {dict(refused.most_common(12))}")
        return rows(seen, done, told.num_checks)


def rows(seen: list[tuple[Held, Held]], done: Counter[str], num_checks: int) -> list[Row]:
    """What was seen as rows: the last quarter beside the second one."""
    quarter = len(seen) // 4
    found = []
    for who, held in (
        ("the node", [one for one, _ in seen]),
        ("the API", [one for _, one in seen]),
    ):
        early, late = held[quarter : 2 * quarter], held[3 * quarter :]
        mib, mib_late = (float(np.median([one.mib for one in some])) for some in (early, late))
        files, files_late = (min(one.files for one in some) for some in (early, late))
        detail = f"{mib:.1f} MiB in the second quarter, {mib_late:.1f} MiB in the last"
        found.append(Row(NAME, f"memory of {who}, last quarter / second", mib_late / mib, MOST,
                         detail=detail))  # fmt: skip
        detail = f"{files} in the second quarter, {files_late} in the last"
        found.append(Row(NAME, f"descriptors of {who}, more", files_late - files, 0, detail=detail))
    detail = f"{done['prompts']} prompts, {done.total() - done['prompts']} other things"
    found.append(
        Row(NAME, "checks of the node's laws that held", num_checks, 1, at_most=False,
            detail=detail)
    )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
