"""The histories of `test_node_histories`, with tenants: quotas, pins, and clears by tenant."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from tests.property.test_node_histories import (
    NBYTES,
    ORDERS,
    OWNER_OF,
    OWNERS,
    PROMPTS,
    Histories,
    Name,
    prompts,
)
from tests.support.nodes import NAMESPACE, SLOT

from kvstrata.errors import KVStrataError
from kvstrata.node.common.changes import Cause
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.clients import Client
from kvstrata.testing.clock import ManualClock
from kvstrata.wire import protocol as p

TIERS = ["host", "memory", "disk"]
owners_ = st.sampled_from(OWNERS)


class Watcher:
    """Nothing that was pinned goes for something else, unless it is kept elsewhere."""

    def __init__(self, histories: OwnerHistories) -> None:
        self.histories = histories

    def entered(self, tier: str, key: bytes, part: int) -> None:
        pass

    def found(self, tier: str, names: Sequence[Name]) -> None:
        pass

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        kept = (tier, key) in self.histories.kept
        if kept and cause is Cause.EVICTED and key in self.histories.node.tenants.pinning._wanted:
            others = [index for name, index in self.histories.indexes() if name != tier]
            assert any(key in index.pinned for index in others), "what was pinned was evicted"

    def emptied(self, tier: str) -> None:
        pass


class OwnerHistories(Histories):
    def start(self) -> None:
        self.kept: set[tuple[str, bytes]] = set()
        self.owner_clears: list[tuple[asyncio.Future[Any], dict[Name, set[bytes]]]] = []
        if not hasattr(self, "wall"):
            self.wall = ManualClock()
            self.quotas: dict[tuple[bytes, str], int | None] = {}
            self.pins: dict[tuple[bytes, str], float] = {}
        super().start()
        self.node.tenants.pinning._wall = self.wall
        self.node.changes.watch(Watcher(self))

    def indexes(self) -> list[tuple[str, Any]]:
        owned = [one for one in self.node.backings if isinstance(one, OwnedBacking)]
        return [("host", self.node.host.index), *((one.name, one.index) for one in owned)]

    def say(self, message: Any) -> Any:
        """What a node answers within a while; None: not yet, or that it holds only for now."""

        async def work() -> Any:
            reply = self.node.handle(Client("pid 2"), message)
            if not isinstance(reply, Awaitable):
                return reply
            asked = asyncio.ensure_future(reply)
            self.said.append(asked)
            await asyncio.wait([asked], timeout=0.05)
            return asked.result() if asked.done() and not asked.exception() else None

        self.said: list[asyncio.Future[Any]] = getattr(self, "said", [])
        return self.run(work())

    @rule(owner=owners_, tier=st.sampled_from(TIERS), slots=st.none() | st.integers(0, 12))
    def set_quota(self, owner: bytes, tier: str, slots: int | None) -> None:
        nbytes = None if slots is None else slots * SLOT
        self.open_gates()
        self.say(p.Quota(1, owner, tier, nbytes))
        self.quotas[owner, tier] = nbytes
        for name, index in self.indexes():
            if name == tier:
                accounts = [one for one in index.owners if one.owner == owner]
                assert [one.quota_bytes for one in accounts] in ([nbytes], [None][: len(accounts)])

    @rule(prompt=prompts, count=st.integers(1, 4), name=st.sampled_from("ab"),
          ttl_s=st.sampled_from([1.0, 100.0]))  # fmt: skip
    def pin(self, prompt: list[bytes], count: int, name: str, ttl_s: float) -> None:
        self.open_gates()
        owner = OWNER_OF[prompt[0]]
        pinned = self.say(p.Pin(1, b"".join(prompt[:count]), owner, name, ttl_s))
        self.pins[owner, name] = self.wall() + ttl_s
        if pinned is not None:
            assert pinned.num_chunks == count
            assert pinned.num_kept <= count

    @rule(owner=owners_, name=st.sampled_from("ab"))
    def unpin(self, owner: bytes, name: str) -> None:
        self.open_gates()
        self.say(p.Unpin(1, owner, name))
        self.pins.pop((owner, name), None)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.open_gates()
        self.wall.advance(seconds)
        self.run(self.node.tenants.pinning.expire())
        self.pins = {id: until for id, until in self.pins.items() if until > self.wall()}

    @rule(
        owner=owners_ | st.just(b""),
        namespace=st.sampled_from([b"", NAMESPACE, bytes(reversed(NAMESPACE))]),
    )
    def clear_marked(self, owner: bytes, namespace: bytes) -> None:
        """Nothing of it is found from now on, whatever hangs; a scan does not bring it back."""
        if not owner and not namespace:
            return
        fits = namespace in (b"", NAMESPACE)
        gone = {key for key in OWNER_OF if fits and owner in (b"", OWNER_OF[key])}
        for taken in self.open_reservations:
            taken.cleared |= gone & set(taken.prefix)
        left: dict[Name, set[bytes]] = {}
        for name in NBYTES:
            if name[0] in gone and (versions := self.model.pop(name, None)):
                left[name] = versions
                self.doubtful.add(name)

        async def begin() -> asyncio.Future[Any]:
            reply = self.node.handle(Client("pid 2"), p.Clear(1, None, [], owner, namespace))
            assert isinstance(reply, Awaitable)
            return asyncio.ensure_future(reply)

        clearing = self.run(begin())
        self.owner_clears.append((clearing, left))
        self.open_gates()
        # From when it is done nobody is served any of it.
        self.run(asyncio.wait([clearing]))
        self.harvest()
        with contextlib.suppress(KVStrataError):
            clearing.result()
            self.owner_clears.remove((clearing, left))

    @rule(owner=owners_)
    def restart_and_clear(self, owner: bytes) -> None:
        """What a scan found is nobody's yet."""
        self.restart(True)
        self.clear_marked(owner, b"")
        for number, prompt in enumerate(PROMPTS):
            self.ask(number, prompt, [0, 1], ORDERS, True)
        self.load(0)

    @invariant()
    def pins_and_quotas(self) -> None:
        if not hasattr(self, "node"):
            return
        self.kept = {(name, key) for name, index in self.indexes() for key in index.pinned}
        for clearing, left in self.owner_clears:
            assert clearing.done()
            for name, versions in left.items():
                self.undead.setdefault(name, set()).update(versions)
        self.owner_clears = []


OwnerHistories.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestOwnerHistories(OwnerHistories.TestCase):  # type: ignore[misc, valid-type]
    pass
