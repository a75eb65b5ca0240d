"""A node's membership: it registers for a while, renews that, and obeys before it shares.

Whoever gives a command waits for every node that is registered. So a node that cannot be sure to be
registered any more, by its own clock, uses nothing that it shares with others, and lets others read
nothing, until it is registered again and has carried out what it missed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

import kvstrata
from kvstrata.config import Config
from kvstrata.errors import ConfigError, KVStrataError, TierUnavailable
from kvstrata.fleet import commands
from kvstrata.fleet.members import DRAINING, JOINING, LASTS_S, MEMBER, Holding, Member, Model
from kvstrata.fleet.registry import Registry, Renewal
from kvstrata.node.common.background import NICE, Tasks, Threads
from kvstrata.node.common.standing import Standing
from kvstrata.node.fleet.finding import Finding
from kvstrata.node.fleet.obeying import FORGETTING, Obeying
from kvstrata.node.fleet.telling import Telling
from kvstrata.node.node import Node
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.service.shared import SharedBacking
from kvstrata.observe.counters import Value
from kvstrata.transfer.tcp import Address
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)

R = TypeVar("R")

SURE = 0.8
"""The share of a registration's time for which a node relies on it: two clocks count it."""
TICKS = 20
"""How often a registration is renewed while it lasts."""
JOIN_S = 6.0
"""How long a node that starts waits for its fleet before it serves without."""


class Membership:
    """Keeps a node in its fleet; made before the node starts, on its loop.

    Args:
        node: the node.
        registry: of the fleet; owned from now on.
        socket: path of the node's socket.
        lasts_s: for how long a registration lasts.
    """

    def __init__(self, node: Node, registry: Registry, socket: str, lasts_s: float) -> None:
        self.name = node.config.fleet.name
        self.standing = Standing(time.monotonic)
        self._node = node
        self._registry = registry
        self._socket = socket
        api = node.config.api.listen
        self._api = str(api) if isinstance(api, Address) else ""
        self._lasts_s = lasts_s
        self._threads = Threads(4, "kvstrata-fleet", NICE)
        self._tasks = Tasks(node.counters)
        self._boot = 0
        self._displaced = False  # another process has this node's name
        self._seen: int | None = None
        self._generation: bytes | None = None
        self._obeying: asyncio.Task[None] | None = None
        self._clears = 0  # number of the last command that made this node forget something
        self._absent_since = self._expires = 0.0  # by the registry's clock
        self._clock_offset_s = 0.0  # by how much the machine's clock is ahead of the registry's
        self._trouble = ""
        self._own = {"host": node.host.index} | {
            one.name: one.index for one in node.backings if isinstance(one, OwnedBacking)
        }
        self._obey = Obeying(node, registry, self._in_thread)
        self.telling = Telling(
            registry, self.name, node.watching.journal, self._own, node.counters, self._in_thread
        )
        node.fleet_state = self.shown
        node.measures.of_fleet = self._gauges
        node.lender.allowed = self.standing.good
        for backing in node.backings:
            if isinstance(backing, PeerBacking):
                backing.allowed = self.standing.meets_peers
            elif isinstance(backing, SharedBacking):
                backing.allowed = self.standing.good
        self._finding = Finding.of(node, registry)

    @classmethod
    def of(cls, node: Node, path: Path | None) -> Membership | None:
        """As configured; None where the node is in no fleet, or cannot be.

        Args:
            node: the node.
            path: of its socket, if it has one.
        """
        config = node.config
        if config.fleet.registry is None:
            return None
        try:
            registry = Registry.of(config)
        except ConfigError as error:
            logger.error("this node is in no fleet: %s", error)
            node.left_out["fleet"] = str(error)
            return None
        node.config = named(config, path)
        return cls(node, registry, str(path or ""), LASTS_S)

    async def start(self) -> None:
        """Register, and carry out what was missed, before anybody is served; or later, if the
        registry does not answer in time."""
        deadline = time.monotonic() + JOIN_S
        self._tasks.spawn("the fleet", self._run())
        self._tasks.spawn("the fleet's events", self.telling.run())
        while not self.standing.good() and time.monotonic() < deadline and not self._trouble:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Leave the fleet. Repeatable."""
        await self._tasks.cancel()
        if self._boot and self.standing.registered:
            try:
                await asyncio.wait_for(self._in_thread(self._leave), 2.0)
            except (KVStrataError, asyncio.TimeoutError) as error:
                logger.info("the fleet was not told that this node ends: %s", error)
        self._threads.close()
        self._finding.close()
        self._registry.close()

    def shown(self) -> dict[str, Any]:
        """For a status."""
        return {
            "name": self.name,
            "state": self._state if self.standing.good() else self._trouble or "joining",
            "seen": self._seen or 0,
            "events_behind": self.telling.behind,
            "event_gaps": self.telling.lost,
            "clock_offset_s": round(self._clock_offset_s, 4),
        }

    def _gauges(self) -> Iterable[Value]:
        return (
            Value("fleet_ok", {}, float(self.standing.good())),
            Value("fleet_untold_chunks", {}, self.telling.behind),
            Value("fleet_clock_offset_seconds", {}, self._clock_offset_s),
        )

    # how

    @property
    def _state(self) -> str:
        if not self.standing.caught_up:
            return JOINING
        return DRAINING if self._node.operations.drainer.draining else MEMBER

    async def _in_thread(self, call: Callable[[], R]) -> R:
        return await asyncio.wrap_future(self._threads.submit(call))

    def _leave(self) -> None:
        self._registry.leave(self._member())

    async def _run(self) -> None:
        while True:
            try:
                await self._tick()
                self._heard("")
            except KVStrataError as error:
                self._heard(str(error))
            await asyncio.sleep(self._lasts_s / TICKS)

    def _heard(self, trouble: str) -> None:
        """Say once that the registry is lost, and once that it is back."""
        if bool(trouble) != bool(self._trouble):
            if trouble:
                logger.warning(
                    "the fleet's registry is lost; what is shared rests until it is back: %s",
                    trouble,
                )
            else:
                logger.info("the fleet's registry is back")
        self._trouble = trouble

    async def _tick(self) -> None:
        """Renew the registration, and see what there is to do.

        Raises:
            KVStrataError: the registry cannot be used, or the node's name is another's.
        """
        if not self._boot:
            self._boot = self.telling.boot = await self._in_thread(
                partial(self._registry.begin, self.name)
            )
        begun = time.monotonic()
        seen, member = self._seen, self._member()
        renewal: Renewal = await self._in_thread(
            partial(self._registry.renew, member, self._lasts_s, seen)
        )
        if renewal.displaced:
            self.standing.caught_up = False
            self._displaced = True
            raise TierUnavailable(
                f"another node is {self.name!r} in the fleet now; give each its own fleet.name"
            )
        if self._displaced:
            # The other one has ended. It was of a later boot, and so are its events.
            self._boot = await self._in_thread(partial(self._registry.begin, self.name))
            self.telling.begin_as(self._boot)
            self._displaced = False
            return
        if not self.standing.registered:
            self.standing.caught_up = False
            if self._generation is not None:
                self._absent_since = self._expires
            elif renewal.last:  # another process of this name may have been at it until then
                self._absent_since = renewal.last + 1 + self._lasts_s
        if self._generation is not None and renewal.generation != self._generation:
            # Numbers begin again there, and what it knew of this node is gone.
            self.standing.caught_up = False
            self._seen = None
        if not renewal.before and self._generation is not None:
            self.telling.begin_anew()
        is_new, self._generation = renewal.generation != self._generation, renewal.generation
        self._expires = renewal.now + self._lasts_s
        self.standing.until = begun + SURE * self._lasts_s
        self._clock_offset_s = renewal.clock_offset_s
        self._node.wall.heard(renewal.now, (begun + time.monotonic()) / 2)
        if is_new and seen is not None:
            return
        if self._seen is None:
            self._seen = renewal.seen
        if self._obeying is None or self._obeying.done():
            missed = [one for one in renewal.commands if one[0] > self._seen]
            if missed:
                self._obeying = self._tasks.spawn("the fleet's commands", self._carry_out(missed))
            else:
                self.standing.caught_up = True
        await self._settle()

    async def _settle(self) -> None:
        """See who the others are, where that is needed."""
        if self.standing.exchanging and not self._finding.wanted:
            return
        members = await self._in_thread(self._registry.members)
        self._finding.meet([one for one in members if one.name != self.name])
        # Nothing that was forgotten here may come back from one that has not forgotten it yet.
        if all(one.seen >= self._clears for one in members):
            self.standing.exchanging = True

    async def _carry_out(self, missed: Sequence[tuple[int, bytes]]) -> None:
        assert self._seen is not None
        assert self._generation is not None
        generation = self._generation
        if missed[0][0] > self._seen + 1:
            logger.warning("commands of the fleet were missed that its registry has forgotten: "
                           "this node forgets all that its own tiers have")  # fmt: skip
            await self._obey.forget_own()
        for number, value in missed:
            self._hold_peers(number, value)
            absent_since = None if self.standing.caught_up else self._absent_since
            reply, cleared = await self._obey.carry_out(number, value, absent_since)
            if isinstance(reply, p.Failed):
                logger.warning("command %d of the fleet: %s", number, reply.message)
            answer = partial(
                commands.answer,
                self._registry,
                generation,
                self._member(),
                number,
                reply,
                cleared,
            )
            await self._answered(partial(self._in_thread, answer))
            if self._generation != generation:
                return
            self._seen = number

    def _hold_peers(self, number: int, value: bytes) -> None:
        """Read from no other node until all have carried out what makes them forget."""
        try:
            request = p.decode_request(commands.decode_command(value).request)
        except KVStrataError:
            return
        if isinstance(request, FORGETTING):
            self.standing.exchanging = False
            self._clears = number

    async def _answered(self, call: Callable[[], Awaitable[None]]) -> None:
        """Do it until it succeeds; the tick says meanwhile why not."""
        while True:
            try:
                return await call()
            except KVStrataError:
                await asyncio.sleep(self._lasts_s / TICKS)

    def _member(self) -> Member:
        node = self._node
        host = node.host
        tiers = [
            Holding("host", False, host.pool.capacity_bytes, host.allocated_bytes, len(host.index))
        ]
        for backing in node.backings:
            if isinstance(backing, OwnedBacking):
                index = backing.index
                tiers.append(
                    Holding(backing.name, False, index.capacity_bytes, index.used_bytes, len(index))
                )
            else:
                tiers.append(Holding(backing.name, True))
        shown = node.records.shown()["namespaces"]
        return Member(
            self.name, self._boot, kvstrata.__version__, p.PROTOCOL_VERSION, os.getpid(),
            self._socket, node.address, self._api, self._state, self._seen or 0,
            round(self._clock_offset_s, 4), tiers,
            [_model(one) for one in shown],
        )  # fmt: skip


def _model(shown: dict[str, Any]) -> Model:
    parts = shown["parts"]
    ranks = (parts["slices"] or parts["tensor_parallel"]) * parts["pipeline_parallel"]
    name = str(shown["model"].get("name", ""))[:512]
    objects, needs = shown["objects"], shown["needs"]
    size = parts["chunk_tokens"]
    return Model(shown["digest"], name, size, len(objects) or ranks, objects, needs, parts["pages"])


def named(config: Config, path: Path | None) -> Config:
    """The configuration with this node's own name in the fleet."""
    if config.fleet.name != "auto":
        return config
    machine = "".join(c if c.isalnum() or c in "._-" else "-" for c in socket.gethostname())
    digest = blake3(str(path or os.getpid()).encode()).hexdigest()[:8]
    name = f"{machine[:48] or 'node'}-{digest}"
    return replace(config, fleet=replace(config.fleet, name=name))
