"""Random histories of an operator's work on one node, against plain sets of what lies where.

Nothing is ever evicted here, so a chunk is exactly where it was put: stored, copied, moved,
prefetched, transcoded, cleared. Now and then a job is met by a clear or a cancel in the middle:
then what was cleared is nowhere, and nothing else is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.nodes import (
    SLOT,
    GatedTier,
    chunk_keys,
    clear,
    flush,
    load,
    make_backing,
    store,
    until,
)
from tests.support.working import ask, begun, done, ended, packed

from kvstrata.config import Config, HostConfig, LeaseConfig
from kvstrata.memory.pool import Pool
from kvstrata.node.common import slices
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.observe.counters import Counters
from kvstrata.wire import operating as o

PROMPTS = [chunk_keys(4, prompt) for prompt in range(2)]
ALL = [key for prompt in PROMPTS for key in prompt]
TIERS = ["host", "a", "b"]
ROOM = 2 * len(ALL)

prompts = st.sampled_from(PROMPTS)
tiers = st.sampled_from(TIERS)
slower = st.sampled_from(TIERS[1:])
some = st.lists(st.sampled_from(ALL), min_size=1, max_size=5, unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), prompts),
        st.tuples(st.just("clear"), st.one_of(st.none(), some), st.sets(tiers, min_size=1)),
        st.tuples(st.sampled_from(["copy", "move"]), some, tiers, tiers),
        st.tuples(st.just("prefetch"), prompts),
        st.tuples(st.just("transcode"), slower, st.sampled_from(["raw", "lossless"])),
        st.tuples(st.just("scrub"), tiers),
        st.tuples(st.just("load"), prompts),
        st.tuples(st.just("met"), some, slower, some, st.sampled_from(["clear", "cancel"])),
        st.tuples(st.just("drain")),
    ),
    max_size=12,
)


class Operated:
    """A node with two slower tiers, and what should lie in each."""

    def __init__(self) -> None:
        counters = Counters()
        self.gates = {name: GatedTier() for name in TIERS[1:]}
        backings = []
        for name, tier in self.gates.items():
            tier.name = name
            backings.append(make_backing(tier, ROOM, counters=counters))
        config = Config(
            host=HostConfig(capacity=ROOM * SLOT, verify_every=0),
            leases=LeaseConfig(per_client=Fraction(1), total=Fraction(1)),
        )
        self.node = Node(config, Pool.create(ROOM * SLOT), backings, counters)
        self.me = Client("pid 1")
        self.held: dict[str, set[bytes]] = {name: set() for name in TIERS}

    def lies_in(self, tier: str) -> set[bytes]:
        return set(self.node.operations.directory.after([tier], b"", 100))

    def anywhere(self) -> set[bytes]:
        return set().union(*map(self.lies_in, TIERS))

    async def check(self) -> None:
        await flush(self.node, self.me)
        for tier in TIERS:
            assert self.lies_in(tier) == self.held[tier], tier
        for backing in self.node.backings:
            await until(lambda one=backing: not len(one._turns))  # type: ignore[misc]
        self.node.check_integrity(contents=True)

    async def step(self, kind: str, *how: Any) -> None:
        await getattr(self, kind)(*how)

    async def store(self, prompt: list[bytes]) -> None:
        new = {key for key in prompt if not any(key in held for held in self.held.values())}
        lacking = {key for key in prompt if key not in self.held["host"]}
        assert store(self.node, self.me, prompt) == len(new & lacking)
        for tier in TIERS:
            self.held[tier] |= new

    async def clear(self, keys: list[bytes] | None, names: set[str]) -> None:
        await clear(self.node, self.me, keys, sorted(names))
        for tier in names:
            self.held[tier] -= set(ALL if keys is None else keys)

    async def copy(self, keys: list[bytes], source: str, target: str) -> None:
        await self._bring(o.Copy, keys, source, target)

    async def move(self, keys: list[bytes], source: str, target: str) -> None:
        await self._bring(o.Move, keys, source, target)
        if source != target:
            self.held[source] -= set(keys)

    async def _bring(self, message: type, keys: list[bytes], source: str, target: str) -> None:
        if source == target:
            return
        job = await done(self.node, message(1, packed(keys), source, target))
        brought = set(keys) & self.held[source] - self.held[target]
        assert job.nbytes == len(brought) * SLOT
        self.held[target] |= set(keys) & self.held[source]

    def _leading(self, prompt: Iterable[bytes]) -> list[bytes]:
        leading = []
        for key in prompt:
            if not any(key in held for held in self.held.values()):
                break
            leading.append(key)
        return leading

    def _promoted(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key not in self.held["host"]:
                self.held["a"].add(key)  # on its way up, or there already
                self.held["host"].add(key)

    async def prefetch(self, prompt: list[bytes]) -> None:
        leading = self._leading(prompt)
        job = await ended(self.node, await begun(self.node, o.Prefetch(1, packed(prompt))))
        assert (job.state, job.done) == ("done" if leading else "failed", len(leading)), job
        self._promoted(leading)

    async def load(self, prompt: list[bytes]) -> None:
        leading = self._leading(prompt)
        assert await load(self.node, self.me, prompt) == len(leading)
        self._promoted(leading)

    async def transcode(self, tier: str, codec: str) -> None:
        assert (await done(self.node, o.Transcode(1, tier, codec))).done == len(self.held[tier])

    async def scrub(self, tier: str) -> None:
        assert (await done(self.node, o.Scrub(1, tier))).done == len(self.held[tier])

    async def drain(self) -> None:
        await done(self.node, o.Drain(1))
        assert (await ask(self.node, o.Undrain(1))).count == 1

    async def met(self, keys: list[bytes], tier: str, cleared: list[bytes], by: str) -> None:
        """A move out of host memory is met in the middle."""
        before, gate = self.anywhere(), self.gates[tier]
        gate.shut("write")
        number = await begun(self.node, o.Move(1, packed(keys), "host", tier))
        job = self.node.operations.jobs.get(number)
        assert job is not None
        await until(lambda: bool(gate.waiting) or not job.running)
        if by == "cancel":
            await ask(self.node, o.Cancel(1, number))
            gate.open()
            gone: set[bytes] = set()
        else:
            clearing = asyncio.ensure_future(clear(self.node, self.me, cleared))
            await asyncio.sleep(0)
            gate.open()
            await clearing
            gone = set(cleared)
        await until(lambda: not job.running)
        await flush(self.node, self.me)
        assert self.anywhere() == before - gone
        self.held = {name: self.lies_in(name) for name in TIERS}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "HOLD_S", 60.0)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_everything_is_where_it_was_put(history: list[tuple[Any, ...]]) -> None:
    async def main() -> None:
        operated = Operated()
        await operated.node.start()
        try:
            for step in history:
                await asyncio.wait_for(operated.step(*step), 20)
                await operated.check()
        finally:
            await operated.node.stop(drain_s=1.0)

    asyncio.run(main())
