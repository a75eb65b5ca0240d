"""What operators do, at random, with a check of every answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

from benchmarks.common import Wrong, expect
from benchmarks.soak.documents import CHUNK, Documents
from benchmarks.soak.driving import WAIT_S, Driver

from kvstrata.control.client import ApiProblem, Client
from kvstrata.errors import UsageError

VERBS_PER_S = 10.0


class Operator(Driver):
    """Uses each verb of the API: all of them once, then at random."""

    def __init__(
        self, url: str, tenants: Sequence[Documents], number: int, ending: threading.Event
    ) -> None:
        super().__init__(f"operator {number}", VERBS_PER_S, ending)
        self._client = Client(url, timeout_s=WAIT_S)
        self._tenants = tenants
        self._rng = random.Random(1000 + number)
        # A clear of much is rare, or nothing would ever be evicted.
        self._verbs = {
            self.lookup: 20, self.explain: 4, self.status: 8, self.metrics: 6, self.lists: 8,
            self.pin: 4, self.unpin: 3, self.quota: 2, self.prefetch: 6, self.copy: 4,
            self.move: 3, self.clear_keys: 2, self.clear_tenant: 0.1, self.clear_old: 0.2,
            self.transcode: 0.5, self.scrub: 0.5, self.cancel: 2, self.inspect: 6,
            self.drain: 0.5, self.flush: 1, self.nonsense: 2,
        }  # fmt: skip
        self._first = list(self._verbs)

    @property
    def verbs(self) -> list[str]:
        """Names of all of them, as they are counted."""
        return [verb.__name__ for verb in self._verbs]

    def one(self) -> str:
        if self._first:
            verb = self._first.pop(0)
        else:
            verb = self._rng.choices(list(self._verbs), list(self._verbs.values()))[0]
        verb()
        return verb.__name__

    def close(self) -> None:
        self._client.close()

    def _prompt(self) -> tuple[Documents, list[int]]:
        documents = self._rng.choice(self._tenants)
        return documents, documents.tokens[documents.pick(self._rng)]

    def lookup(self) -> None:
        documents, prompt = self._prompt()
        found = self._client.lookup(tokens=prompt, namespace=documents.digest)
        expect(found.leading_chunks * CHUNK <= len(prompt), "more is found than was asked for")

    def explain(self) -> None:
        documents, prompt = self._prompt()
        explained = self._client.explain(tokens=prompt, namespace=documents.digest)
        told = sum(explained.tiers.values()) + sum(one.tokens for one in explained.reasons)
        expect(told == len(prompt), f"{told} tokens of {len(prompt)} are explained")

    def status(self) -> None:
        self._client.status()
        self._client.ready()

    def metrics(self) -> None:
        expect("kvstrata_host_capacity_bytes" in self._client.metrics(), "no metrics")

    def lists(self) -> None:
        self._client.requests(limit=50)
        self._client.chunks(limit=100)
        self._client.pins(limit=50)
        for job in self._client.jobs(limit=50).jobs:
            troubled = job.kind == "scrub" and job.failed
            expect(not troubled, f"a scrub found something: {job.troubles}")

    def pin(self) -> None:
        documents, prompt = self._prompt()
        name, ttl_s = f"p{self._rng.randrange(50)}", self._rng.choice([1.0, 30.0])
        self._client.pin(name, ttl_s, tokens=prompt, namespace=documents.digest)

    def unpin(self) -> None:
        if pins := self._client.pins(limit=10).pins:
            one = self._rng.choice(pins)
            self._client.unpin(one.name, owner=one.owner)

    def quota(self) -> None:
        owner = self._rng.choice(self._tenants).owner.hex()
        nbytes = self._rng.choice([None, 16 << 20, 64 << 20])
        self._client.quota(self._rng.choice(["host", "disk"]), nbytes, owner=owner)

    def prefetch(self) -> None:
        documents, prompt = self._prompt()
        self._client.prefetch(tokens=prompt, namespace=documents.digest)

    def copy(self) -> None:
        documents, prompt = self._prompt()
        self._client.copy("host", "disk", tokens=prompt, namespace=documents.digest)

    def move(self) -> None:
        documents, prompt = self._prompt()
        source, target = self._rng.choice([("host", "disk"), ("disk", "host")])
        self._client.move(source, target, tokens=prompt, namespace=documents.digest)

    def clear_keys(self) -> None:
        documents = self._rng.choice(self._tenants)
        keys = documents.keys[documents.pick(self._rng)]
        begun = time.monotonic_ns()
        self._client.clear(keys=[key.hex() for key in keys])
        documents.cleared(keys, begun)

    def clear_tenant(self) -> None:
        documents = self._rng.choice(self._tenants)
        begun = time.monotonic_ns()
        self._client.clear(owner=documents.owner.hex())
        documents.all_cleared(begun)

    def clear_old(self) -> None:
        self._client.clear(before=time.time() - 300.0)

    def transcode(self) -> None:
        self._client.transcode("disk", self._rng.choice(["raw", "lossless"]))

    def scrub(self) -> None:
        self._client.scrub(self._rng.choice(["host", "disk"]))

    def cancel(self) -> None:
        for job in self._client.jobs(limit=5).jobs:
            self._client.cancel(job.id)

    def inspect(self) -> None:
        held = self._client.chunks(limit=20).chunks
        if held:
            one = self._rng.choice(held)
            found = self._client.inspect(self._rng.choice(["host", "disk"]), one.key)
            expect(not found.nbytes or not found.problem, f"{one.key}: {found.problem}")

    def drain(self) -> None:
        self._client.drain()
        self._client.undrain()

    def flush(self) -> None:
        self._client.flush()

    def nonsense(self) -> None:
        try:
            self._client.lookup(keys=["zz"])
        except (ApiProblem, UsageError):
            return
        raise Wrong("a key of no digits was looked up")


def scrubbed(client: Client, tier: str) -> int:
    """Verify all that a tier holds; how many objects that were."""
    job = client.scrub(tier)
    end = time.monotonic() + WAIT_S
    while job.state == "running" and time.monotonic() < end:
        time.sleep(0.1)
        job = client.job(job.id)
    expect((job.state, job.failed) == ("done", 0), f"the scrub of {tier}: {job}")
    return job.done
