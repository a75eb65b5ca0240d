"""What engines do, at random, with a check of every answer."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.common import expect
from benchmarks.soak.documents import CHUNK, NBYTES, Documents, payload, stamp_of

from kvstrata.config import load_config
from kvstrata.errors import Busy, ReadOnly, UsageError
from kvstrata.keys import Namespace
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect
from kvstrata.wire.namespaces import Described

PROMPTS_PER_S = 8.0
WAIT_S = 30.0
ORDER = "benchmark/soak"
KILLED = -9

Settings = Mapping[str, Any]


class Driver(threading.Thread):
    """Does one thing after another until it is told to end, or one goes wrong.

    Args:
        name: in what it counts.
        rate: how many a second at most.
        ending: set when it is to end.
    """

    def __init__(self, name: str, rate: float, ending: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """What the node said no to, as it may."""
        self.wrong = ""
        self._rate = rate
        self._ending = ending

    def run(self) -> None:
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            due = max(due, time.monotonic() - 1.0) + 1.0 / self._rate
            try:
                self.done[self.one()] += 1
            except (UsageError, Busy, ReadOnly) as error:
                self.refused[f"{type(error).__name__}: {error}"[:60]] += 1
            except Exception as error:  # a mistake of the driver's own ends the run, too
                self.wrong = f"{self.name}: {error!r}"
                self._ending.set()
        self.close()

    def one(self) -> str:
        """Do something; its name."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything."""


class Engine(Driver):
    """Looks a prompt up, loads what is there, checks it, and stores the rest."""

    def __init__(
        self, settings: Settings, documents: Documents, number: int, ending: threading.Event
    ) -> None:
        super().__init__(f"engine {number}", PROMPTS_PER_S, ending)
        self.asked = 0
        self.came: Counter[str] = Counter()
        """Chunks that were loaded and compared, by the tier that had them."""
        self._config = load_config(environ={}, overrides=settings)
        self._documents, self._number = documents, number
        self._rng = random.Random(number)
        self._client = self._connected()
        self._tiers = ["host", *self._client.hello.tiers]
        self._first = [self._killed, self._left]

    def _connected(self) -> NodeClient:
        client = connect(self._config)
        client.record(Described(self._documents.space, {"name": "m"}).record())
        return client

    def one(self) -> str:
        if self._first:
            return self._first.pop()()
        what = self._rng.random()
        if what < 0.01:
            return self._left()
        if what < 0.011:
            return self._killed()
        return self.prompt(self._documents.pick(self._rng))

    def prompt(self, number: int) -> str:
        """Answer one: load what is there of it, and store the rest."""
        keys = self._documents.keys[number]
        floors = self._documents.floors(keys)
        matched = self._match(keys)
        loaded = self._load(keys, floors, matched) if matched.lease else 0
        stored = self._store(keys)
        self.asked += len(keys)
        tokens = CHUNK * len(keys)
        self._client.record({
            "request": f"{self._number}-{time.monotonic_ns()}", "outcome": "stopped",
            "prompt_tokens": tokens, "loaded_tokens": CHUNK * loaded, "stored_chunks": stored,
            "tier_tokens": {"host": CHUNK * loaded}, "seconds": 0.1,
        })  # fmt: skip
        return "prompts"

    def _left(self) -> str:
        """Go without a word, whatever it holds."""
        self._match(self._documents.keys[0])
        self._client.close()
        self._client = self._connected()
        return "left"

    def _killed(self) -> str:
        """Die in the middle of a store."""
        keys = self._documents.keys[self._documents.pick(self._rng)]
        killed(self._config.to_dict(), self._documents.space, keys)
        return "killed"

    def _match(self, keys: list[bytes]) -> p.Matched:
        call = self._client.match(keys, [0], [ORDER], [NBYTES], self._documents.owner)
        matched: p.Matched = call.wait(WAIT_S)
        return matched

    def _load(self, keys: list[bytes], floors: list[int], matched: p.Matched) -> int:
        """Chunks that came, each of them checked."""
        count, came = len(matched.tiers), 0
        give_up = self._rng.random() < 0.05
        while came < count and not give_up:
            arrived: p.Arrived = self._client.await_arrival(matched.lease, came).wait(WAIT_S)
            offsets = offsets_of(arrived.offsets)
            for number, offset in enumerate(offsets, came):
                view = self._client.pool.view(offset + HEADER_BYTES, NBYTES)
                stamp = stamp_of(bytes(view), keys[number])
                del view
                expect(stamp >= floors[number], f"{keys[number].hex()} was cleared, and came")
                self.came[self._tiers[matched.tiers[number]]] += 1
            self._dawdle()
            came += len(offsets)
            if arrived.failed or not len(offsets):
                break
        self._client.release(matched.lease)
        return came

    def _store(self, keys: list[bytes]) -> int:
        space, owner = self._documents.space.digest(), self._documents.owner
        call = self._client.reserve(space, keys, 0, 0, template(), owner=owner)
        reserved: p.Reserved = call.wait(WAIT_S)
        # What was reserved before a clear is struck by it, so the time counts from here.
        stamp = time.monotonic_ns()
        self._dawdle()
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            if offset < 0:
                sums.append(bytes(16))
                continue
            data = payload(key, stamp)
            self._client.pool.view(offset + HEADER_BYTES, NBYTES)[:] = data
            sums.append(checksum(data))
        done: p.Done = self._client.commit(reserved.reservation, sums).wait(WAIT_S)
        return int(done.count)

    def _dawdle(self) -> None:
        """Take one's time now and then, so that what operators do falls into it."""
        if self._rng.random() < 0.1:
            time.sleep(self._rng.random())

    def close(self) -> None:
        self._client.close()


def template() -> p.Template:
    """The form of every chunk."""
    return p.Template("native", ORDER, "bfloat16", [1, NBYTES // 2], CHUNK, NBYTES)


DIES = """
import os, sys
from benchmarks.soak.driving import half_stored
half_stored(*eval(sys.argv[1]))
os.kill(os.getpid(), 9)
"""


def killed(settings: Settings, space: Namespace, keys: list[bytes]) -> None:
    """Have a process reserve room for chunks of a prompt, and be killed."""
    what = repr((dict(settings), space.digest(), keys))
    command = [sys.executable, "-c", DIES, what]
    status = subprocess.run(command, check=False).returncode
    expect(status == KILLED, f"who was to be killed ended with {status}")


def half_stored(settings: Settings, space: bytes, keys: list[bytes]) -> None:
    """Reserve room for chunks, and write half of each."""
    client = connect(load_config(environ={}, overrides=settings))
    reserved: p.Reserved = client.reserve(space, keys, 0, 0, template()).wait(WAIT_S)
    for offset in offsets_of(reserved.offsets):
        if offset >= 0:
            client.pool.view(offset + HEADER_BYTES, NBYTES // 2)[:] = bytes(NBYTES // 2)
