"""A fleet for tests: nodes that share one store, which is a dictionary with a clock and gates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.nodes import SLOT, GatedTier, make_backing

from kvstrata.config import Config, HostConfig
from kvstrata.errors import TierUnavailable
from kvstrata.memory.pool import Pool
from kvstrata.node.node import Node
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.shared import SharedBacking
from kvstrata.observe.counters import Counters
from kvstrata.tiers.base import Epoch, Limits, Outcome, OwnedTier, Put, SharedTier, Stat
from kvstrata.tiers.epochs import epoch_prefix, marked, new_epoch
from kvstrata.tiers.journal import Journal
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.memory import MemoryTier


class Fleet:
    """What the nodes share. ``delay_s`` is added to every call, ``dead`` makes all of them fail."""

    def __init__(self, lasts_s: float = 1.5) -> None:
        self.objects = MemoryTier()
        self.current = new_epoch(lasts_s)
        self.lock = threading.Lock()
        self.delay_s = 0.0
        self.dead = self.dead_after_next_epoch = False
        self.epochs_asked = 0
        self.gates = {verb: threading.Event() for verb in ("stat", "read", "write", "epoch")}
        self.open()
        self.asked: list[int] = []
        """How many ids each call of ``stat`` had."""

    def shut(self, verb: str) -> None:
        self.gates[verb].clear()

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()

    @property
    def names(self) -> list[bytes]:
        return [found.object_id for batch in self.objects.scan() for found in batch]


class FleetTier(SharedTier):
    """One node's client of a fleet's store."""

    def __init__(self, fleet: Fleet, name: str = "fleet", round_objects: int = 1 << 30) -> None:
        self.name = name
        self.fleet = fleet
        self.limits = Limits(batch_objects=256, round_objects=round_objects, timeout_s=5.0)

    def _pass(self, verb: str) -> MemoryTier:
        if self.fleet.delay_s:
            time.sleep(self.fleet.delay_s)
        assert self.fleet.gates[verb].wait(30)
        if self.fleet.dead:
            raise TierUnavailable("the store is dead")
        return self.fleet.objects

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        self.fleet.asked.append(len(ids))
        return self._pass("stat").stat(ids)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        return self._pass("read").read(ids, into)

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        return self._pass("write").write(puts)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        return self._pass("write").delete(ids, versions)

    def epoch(self) -> Epoch:
        self.fleet.epochs_asked += 1
        self._pass("epoch")
        self.fleet.dead = self.fleet.dead or self.fleet.dead_after_next_epoch
        return self.fleet.current

    def begin_epoch(self) -> Epoch:
        self._pass("epoch")
        with self.fleet.lock:
            self.fleet.current = new_epoch(self.fleet.current.lasts_s)
            return self.fleet.current

    def add_mark(self, mark: Mark) -> Epoch:
        self._pass("epoch")
        with self.fleet.lock:
            self.fleet.current = marked(self.fleet.current, mark)
            return self.fleet.current

    def forget(self, epoch: int) -> int:
        ids = [one for one in self.fleet.names if one.startswith(epoch_prefix(epoch))]
        return self._pass("write").delete(ids).count(Outcome.HIT)

    def close(self) -> None:
        pass


def make_member(
    *tiers: SharedTier,
    slots: int = 40,
    owned: OwnedTier | None = None,
    lookup_timeout_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    journal: Journal | None = None,
    **common: Any,
) -> Node:
    """A node of a fleet, with these shared tiers, and an owned one if it is given."""
    counters = Counters()
    backings: list[Backing] = []
    if owned is not None:
        backings.append(make_backing(owned, counters=counters, clock=clock))
    for tier in tiers:
        settings = {"num_threads": 2, "queue_bytes": 1000 * SLOT, "deadline_s": 10.0, **common}
        backings.append(
            SharedBacking(
                tier, lookup_timeout_s=lookup_timeout_s, counters=counters, clock=clock, **settings
            )
        )
    config = Config(host=HostConfig(capacity=slots * SLOT, verify_every=0))
    pool = Pool.create(slots * SLOT)
    return Node(config, pool, backings, counters, clock=clock, journal=journal)


__all__ = ["Fleet", "FleetTier", "GatedTier", "make_member"]
