"""Keeping an object store to its budget: one node of the fleet removes what was used longest ago.

A pass lists all that is there, a request at a time, then removes what is of a past epoch, and then,
if there is more than the budget, the least recently used. What it remembers of a pass is bounded,
however much there is.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

from kvstrata.errors import ReadOnly
from kvstrata.tiers.epochs import epoch_prefix
from kvstrata.tiers.object_store.client import REMOVE_BATCH, ObjectClient, Turn
from kvstrata.tiers.object_store.lease import Lease
from kvstrata.tiers.object_store.paths import name_of
from kvstrata.tiers.object_store.troubles import Refused
from kvstrata.tiers.object_store.uses import LastUses

logger = logging.getLogger(__name__)

PASS_EVERY_S = 60.0
DOWN_TO = 0.95
"""Of the budget: what a pass leaves that found more than the budget."""
MAX_VICTIMS = 100_000
"""Objects that one pass removes for their age, and as many of past epochs; the next goes on."""
UNFINISHED_S = 3600.0
"""From this age on a file that has not got its name yet has nobody who writes it."""
REFUSED_S = 600.0
"""For how long a node that is not allowed to sweep leaves it to others."""


class Sweep:
    """This node's part in it; one caller at a time.

    Args:
        client: of the store.
        capacity_bytes: the budget.
        present: asks for the number of the present epoch.
        lease: says whether this node may.
        every_s: pause between two passes.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: ObjectClient,
        capacity_bytes: int,
        present: Callable[[Turn], int],
        lease: Lease,
        every_s: float = PASS_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_passes = 0
        self._client = client
        self._capacity_bytes = capacity_bytes
        self._present = present
        self.lease = lease
        self._every_s = every_s
        self._clock = clock
        self._last_uses = LastUses(client)
        self._pass: Iterator[None] | None = None
        self._next = self._refused_until = -math.inf
        self._turn = client.turn()

    def step(self, turn: Turn) -> None:
        """Go on with a pass for as long as the turn lasts, if it is this node that sweeps.

        Raises:
            TierUnavailable: the store cannot be asked; the pass begins anew.
        """
        self._turn = turn
        if self._clock() < self._refused_until:
            return
        try:
            self._go_on(turn)
        except (Refused, ReadOnly) as error:
            # Reading and writing may well go on; and another node may be let to sweep.
            logger.error("cannot sweep: %s", error)
            self._refused_until = self._clock() + REFUSED_S

    def _go_on(self, turn: Turn) -> None:
        if not self.lease.hold(turn):
            self._pass, self._last_uses = None, LastUses(self._client)
            return
        if self._pass is None and self._clock() >= self._next:
            self._pass = self._run()
        while self._pass is not None and turn.left and self.lease.held:
            try:
                next(self._pass)
            except StopIteration:
                self._pass, self._next = None, self._clock() + self._every_s
                self.num_passes += 1
            except BaseException:
                self._pass = None
                raise

    def _run(self) -> Iterator[None]:
        """One pass, a request for each step."""
        client, epoch = self._client, self._present(self._turn)
        yield from self._last_uses.gather(self.lease.now_s, lambda: self._turn)
        total, past = 0, list[str]()
        oldest: list[tuple[float, str, int]] = []  # a heap, the last used of them first
        for batch in client.listing(""):
            for path, nbytes, written_s in batch:
                if (name := name_of(path)) is None:
                    continue
                if not name.startswith(epoch_prefix(epoch)):
                    past.append(path)
                    continue
                total += nbytes
                used = max(written_s, self._last_uses.of(name))
                heapq.heappush(oldest, (-used, path, nbytes))
                if len(oldest) > MAX_VICTIMS:
                    heapq.heappop(oldest)
            del past[MAX_VICTIMS:]
            yield
        if self._present(self._turn) != epoch:
            return  # what looked like the past may have been the future
        yield from self._remove(past)
        if total > self._capacity_bytes:
            victims = self._victims(oldest, total - int(DOWN_TO * self._capacity_bytes))
            logger.info(
                "%s: %d bytes more than the budget of %d; %d objects that were used longest ago go",
                client.url, total - self._capacity_bytes, self._capacity_bytes, len(victims),
            )  # fmt: skip
            yield from self._remove(victims)
        for files in client.unfinished(self.lease.now_s - UNFINISHED_S):
            for file in files:
                file.unlink(missing_ok=True)
            yield

    def _victims(self, oldest: list[tuple[float, str, int]], excess: int) -> list[str]:
        """Paths of the least recently used objects that make up so many bytes."""
        victims = []
        for _, path, nbytes in sorted(oldest, reverse=True):
            if excess <= 0:
                break
            victims.append(path)
            excess -= nbytes
        return victims

    def _remove(self, paths: Sequence[str]) -> Iterator[None]:
        for start in range(0, len(paths), REMOVE_BATCH):
            self._client.remove(paths[start : start + REMOVE_BATCH], self._turn)
            yield
