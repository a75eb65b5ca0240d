"""What engines and operators do, at random, each with its own check of every answer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from benchmarks.common import Wrong, expect

from kvstrata.config import load_config
from kvstrata.control.client import ApiProblem, Client
from kvstrata.errors import Busy, KVStrataError, ReadOnly, UsageError
from kvstrata.keys import KeyChain, Namespace
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect
from kvstrata.wire.namespaces import Described

CHUNK = 128
NBYTES = 32 << 10
DOCUMENTS, MOST_CHUNKS = 400, 24
PROMPTS_PER_S, VERBS_PER_S = 8.0, 10.0
"""Of each engine, and of each operator."""
WAIT_S = 30.0
SPACE = Namespace("fingerprint", "layout", CHUNK)
ORDER = "benchmark/soak"

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
            except (KVStrataError, Wrong, OSError) as error:
                self.wrong = f"{self.name}: {error!r}"
                self._ending.set()
        self.close()

    def one(self) -> str:
        """Do something; its name."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything."""


class Documents:
    """Prompts of random tokens, and the keys of their chunks.

    Args:
        secret: of the node.
        seed: of the tokens.
    """

    def __init__(self, secret: bytes, seed: int) -> None:
        chain, rng = KeyChain(secret, SPACE.digest(), CHUNK), np.random.default_rng(seed)
        self.tokens: list[list[int]] = [
            rng.integers(128_000, size=CHUNK * int(rng.integers(1, MOST_CHUNKS + 1))).tolist()
            for _ in range(DOCUMENTS)
        ]
        self.keys = [chain.keys(tokens) for tokens in self.tokens]

    def pick(self, rng: random.Random) -> int:
        """Some more often than others."""
        return min(int(rng.paretovariate(0.6)) - 1, DOCUMENTS - 1)


def payload(key: bytes) -> bytes:
    """What a chunk holds, which its key decides."""
    return key * (NBYTES // len(key))


class Engine(Driver):
    """Looks a prompt up, loads what is there, checks it, and stores the rest."""

    def __init__(
        self, settings: Settings, documents: Documents, number: int, ending: threading.Event
    ) -> None:
        super().__init__(f"engine {number}", PROMPTS_PER_S, ending)
        self._config = load_config(environ={}, overrides=settings)
        self._documents, self._number = documents, number
        self._owner = bytes([number]) * 16
        self._rng = random.Random(number)
        self._client = self._connected()

    def _connected(self) -> NodeClient:
        client = connect(self._config)
        client.record(Described(SPACE, {"name": "m"}).record())
        return client

    def one(self) -> str:
        what = self._rng.random()
        if what < 0.01:  # it goes without a word, whatever it holds
            self._match(self._documents.keys[0])
            self._client.close()
            self._client = self._connected()
            return "left"
        if what < 0.011:  # or in the middle of a store
            killed(self._config.to_dict(), self._rng.randbytes(32))
            return "killed"
        keys = self._documents.keys[self._documents.pick(self._rng)]
        matched = self._match(keys)
        loaded = self._load(keys, matched) if matched.lease else 0
        stored = self._store(keys)
        tokens = CHUNK * len(keys)
        self._client.record({
            "request": f"{self._number}-{time.monotonic_ns()}", "outcome": "stopped",
            "prompt_tokens": tokens, "loaded_tokens": CHUNK * loaded, "stored_chunks": stored,
            "tier_tokens": {"host": CHUNK * loaded}, "seconds": 0.1,
        })  # fmt: skip
        return "prompts"

    def _match(self, keys: list[bytes]) -> p.Matched:
        call = self._client.match(keys, [0], [ORDER], [NBYTES], self._owner)
        matched: p.Matched = call.wait(WAIT_S)
        return matched

    def _load(self, keys: list[bytes], matched: p.Matched) -> int:
        """Chunks that came, each of them checked."""
        count, came = len(matched.tiers), 0
        give_up = self._rng.random() < 0.05
        while came < count and not give_up:
            arrived: p.Arrived = self._client.await_arrival(matched.lease, came).wait(WAIT_S)
            offsets = offsets_of(arrived.offsets)
            for key, offset in zip(keys[came:], offsets, strict=False):
                view = self._client.pool.view(offset + HEADER_BYTES, NBYTES)
                expect(bytes(view) == payload(key), f"{key.hex()} holds something else")
                del view
            came += len(offsets)
            if arrived.failed or not len(offsets):
                break
        self._client.release(matched.lease)
        return came

    def _store(self, keys: list[bytes]) -> int:
        template = p.Template("native", ORDER, "bfloat16", [1, NBYTES // 2], CHUNK, NBYTES)
        namespace, owner = SPACE.digest(), self._owner
        call = self._client.reserve(namespace, keys, 0, 0, template, owner=owner)
        reserved: p.Reserved = call.wait(WAIT_S)
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            if offset >= 0:
                self._client.pool.view(offset + HEADER_BYTES, NBYTES)[:] = payload(key)
            sums.append(checksum(payload(key)) if offset >= 0 else bytes(16))
        done: p.Done = self._client.commit(reserved.reservation, sums).wait(WAIT_S)
        return int(done.count)

    def close(self) -> None:
        self._client.close()


DIES = """
import os, sys
from benchmarks.soak.driving import half_stored
half_stored(eval(sys.argv[1]), bytes.fromhex(sys.argv[2]))
os.kill(os.getpid(), 9)
"""


def killed(settings: Settings, key: bytes) -> None:
    """Have a process reserve room for chunks and be killed."""
    subprocess.run([sys.executable, "-c", DIES, repr(dict(settings)), key.hex()], check=False)


def half_stored(settings: Settings, key: bytes) -> None:
    """Reserve room for a chunk, and write half of it."""
    client = connect(load_config(environ={}, overrides=settings))
    template = p.Template("native", ORDER, "bfloat16", [1, NBYTES // 2], CHUNK, NBYTES)
    reserved: p.Reserved = client.reserve(SPACE.digest(), [key], 0, 0, template).wait(WAIT_S)
    (offset,) = offsets_of(reserved.offsets)
    if offset >= 0:
        client.pool.view(offset + HEADER_BYTES, NBYTES // 2)[:] = bytes(NBYTES // 2)


class Operator(Driver):
    """Uses each verb of the API."""

    def __init__(
        self, url: str, documents: Documents, number: int, ending: threading.Event
    ) -> None:
        super().__init__(f"operator {number}", VERBS_PER_S, ending)
        self._client = Client(url, timeout_s=WAIT_S)
        self._documents = documents
        self._rng = random.Random(1000 + number)
        self._tier = "disk"
        self._owner = os.urandom(16).hex()
        self._verbs: dict[Callable[[], object], int] = {
            self._lookup: 20, self._explain: 4, self._status: 8, self._metrics: 6,
            self._lists: 8, self._pin: 4, self._unpin: 3, self._quota: 2, self._prefetch: 6,
            self._copy: 4, self._move: 3, self._clear_keys: 2, self._clear_tenant: 1,
            self._clear_old: 1, self._transcode: 1, self._scrub: 1, self._cancel: 2,
            self._inspect: 6, self._drain: 1, self._flush: 1, self._nonsense: 2,
        }  # fmt: skip

    def one(self) -> str:
        verb = self._rng.choices(list(self._verbs), list(self._verbs.values()))[0]
        verb()
        return verb.__name__.lstrip("_")

    def close(self) -> None:
        self._client.close()

    def _prompt(self) -> list[int]:
        return self._documents.tokens[self._documents.pick(self._rng)]

    def _lookup(self) -> None:
        prompt = self._prompt()
        found = self._client.lookup(tokens=prompt)
        expect(found.leading_chunks * CHUNK <= len(prompt), "more is found than was asked for")

    def _explain(self) -> None:
        prompt = self._prompt()
        explained = self._client.explain(tokens=prompt)
        told = sum(explained.tiers.values()) + sum(one.tokens for one in explained.reasons)
        expect(told == len(prompt), f"{told} tokens of {len(prompt)} are explained")

    def _status(self) -> None:
        self._client.status()
        self._client.ready()

    def _metrics(self) -> None:
        expect("kvstrata_host_capacity_bytes" in self._client.metrics(), "no metrics")

    def _lists(self) -> None:
        self._client.requests(limit=50)
        self._client.chunks(limit=100)
        self._client.jobs(limit=50)
        self._client.pins(limit=50)

    def _pin(self) -> None:
        name = f"p{self._rng.randrange(50)}"
        self._client.pin(name, self._rng.choice([1.0, 30.0]), tokens=self._prompt())

    def _unpin(self) -> None:
        if pins := self._client.pins(limit=10).pins:
            one = self._rng.choice(pins)
            self._client.unpin(one.name, owner=one.owner)

    def _quota(self) -> None:
        owner = bytes([self._rng.randrange(1, 4)]) * 16
        nbytes = self._rng.choice([None, 16 << 20, 64 << 20])
        self._client.quota(self._rng.choice(["host", "disk"]), nbytes, owner=owner.hex())

    def _prefetch(self) -> None:
        self._client.prefetch(tokens=self._prompt())

    def _copy(self) -> None:
        self._client.copy("host", "disk", tokens=self._prompt())

    def _move(self) -> None:
        self._client.move(*self._rng.choice([("host", "disk"), ("disk", "host")]),
                          tokens=self._prompt())  # fmt: skip

    def _clear_keys(self) -> None:
        keys = self._documents.keys[self._rng.randrange(DOCUMENTS)]
        self._client.clear(keys=[key.hex() for key in keys])

    def _clear_tenant(self) -> None:
        self._client.clear(owner=(bytes([self._rng.randrange(1, 4)]) * 16).hex())

    def _clear_old(self) -> None:
        self._client.clear(before=time.time() - 300.0)

    def _transcode(self) -> None:
        self._client.transcode("disk", self._rng.choice(["raw", "lossless"]))

    def _scrub(self) -> None:
        self._client.scrub(self._rng.choice(["host", "disk"]))

    def _cancel(self) -> None:
        for job in self._client.jobs(limit=5).jobs:
            self._client.cancel(job.id)

    def _inspect(self) -> None:
        held = self._client.chunks(limit=20).chunks
        if held:
            one = self._rng.choice(held)
            self._client.inspect(self._rng.choice(["host", "disk"]), one.key)

    def _drain(self) -> None:
        self._client.drain()
        self._client.undrain()

    def _flush(self) -> None:
        self._client.flush()

    def _nonsense(self) -> None:
        try:
            self._client.lookup(keys=["zz"])
        except (ApiProblem, UsageError):
            return
        raise Wrong("a key of no digits was looked up")
