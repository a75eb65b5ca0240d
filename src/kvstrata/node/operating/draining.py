"""A node that is to be emptied of duties: no new stores, and what is behind is written.

Engines go on reading meanwhile. Where the node is to end afterwards, they are given nothing new
once all is written, and what they have leased by then may come to its end.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.errors import UsageError
from kvstrata.node.operating.jobs import Job
from kvstrata.node.service.movement import Movement
from kvstrata.node.slots.leases import LeaseTable
from kvstrata.node.slots.reservations import ReservationTable

LOOK_S = 0.02
LEASES_S = 30.0
"""How long a node that is to end waits for loads that are under way."""


class Drainer:
    """Whether the node takes stores, and gives anything out.

    Args:
        reservations: what engines are still writing.
        leases: what they are still reading.
        movement: what is still to be written behind.
        end_jobs: asks all jobs but one to end, and says whether there are others.
    """

    def __init__(
        self,
        reservations: ReservationTable,
        leases: LeaseTable,
        movement: Movement,
        end_jobs: Callable[[Job], bool],
    ) -> None:
        #: whether no new stores are taken
        self.draining = False
        #: whether nothing is given out any more, since the node is about to end
        self.closing = False
        #: ends the process; None where that is its owner's to do
        self.end: Callable[[], None] | None = None
        self._reservations = reservations
        self._leases = leases
        self._movement = movement
        self._end_jobs = end_jobs
        self._ends = False

    @property
    def state(self) -> str:
        """For a status: ``no``, ``draining`` or ``ending``."""
        if not self.draining:
            return "no"
        return "ending" if self._ends else "draining"

    def begin(self, *, end: bool) -> None:
        """Take no stores from now on; repeatable.

        Args:
            end: whether the node ends once it is drained.
        Raises:
            UsageError: it is not the node's to end.
        """
        if end and self.end is None:
            raise UsageError("this node runs inside another program, which has to end it")
        self.draining = True
        self._ends = self._ends or end

    def undo(self) -> bool:
        """Take stores again; whether the node did not."""
        was, self.draining = self.draining, False
        self._ends = self.closing = False
        return was

    async def run(self, job: Job) -> None:
        """Wait until nothing is left to be written; then end, if that was asked.

        If the job is cancelled the node goes on: it takes no stores, as before, and does not end.
        """
        try:
            await self._wait(job)
        except BaseException:
            self._ends = self.closing = False
            raise

    async def _wait(self, job: Job) -> None:
        most = 0
        while left := self._left(job):
            most = max(most, left)
            job.total, job.done = most, most - left
            job.note = f"{len(self._reservations)} stores under way, {left} bytes to be written"
            await job.pause(LOOK_S)
            if not self.draining:
                job.stop()
        job.total = job.done = most
        job.note = "all is written"
        if self._ends and self.end is not None:
            self.closing = True
            clock = 0.0
            while len(self._leases) and clock < LEASES_S:
                await job.pause(LOOK_S)
                clock += LOOK_S
            if self._ends:
                self.end()

    def _left(self, job: Job) -> int:
        """Bytes still to be stored; 1 where there are none, but a commit or a job goes on."""
        held = sum(slot.nbytes for slot in self._reservations.filling())
        other = self._end_jobs(job) or bool(self._reservations.finishing)
        return held + self._movement.queued_bytes or int(other)
