"""Watching a node: the changes of its own tiers, from a number on, as soon as there are some."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from kvstrata.errors import UsageError
from kvstrata.node.common.changes import Cause, Changes
from kvstrata.node.common.journal import Journal
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.wire import protocol as p

MOST_AT_ONCE = 1024
LONGEST_WAIT_S = 60.0
MOST_OF_ONE = 8
"""That wait of one process, so that it leaves others some of `journal.MOST_WAITING`."""
ENTERED, EMPTIED = "entered", "emptied"


class Watching:
    """Answers `kvstrata.wire.operating.Watch`; lives on the node's loop.

    Nothing is remembered before somebody asks.

    Args:
        changes: of the node's own tiers.
        tiers: names of all tiers of the node, "host" first.
    """

    def __init__(self, changes: Changes, tiers: Sequence[str]) -> None:
        self._changes = changes
        self._numbers = {name: number for number, name in enumerate(tiers)}
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        """The last changes, from the first time on that anybody asks for it."""
        if self._journal is None:
            self._journal = Journal()
            self._changes.watch(self._journal)
        return self._journal

    def watch(self, client: Client, message: p.Watch) -> Awaitable[p.Watched]:
        """The changes from a number on; the answer, when there are some or the time is over.

        Raises:
            UsageError: a wait that is none.

        Awaiting it raises:
            UsageError: as many of the client's process wait already as may, or of all.
        """
        if not 0.0 <= message.wait_s <= LONGEST_WAIT_S:
            raise UsageError(f"a wait of {message.wait_s:g} s; expected 0 to {LONGEST_WAIT_S:g}")
        journal = self.journal
        since = message.since if message.since >= 0 else journal.next

        async def answer() -> p.Watched:
            if since == journal.next:
                await self._wait(client.holder, since, message.wait_s)
            read = journal.read(since, MOST_AT_ONCE)
            changes = [
                p.Change(self._numbers[one.tier], _what(one.key, one.cause), one.key, one.part)
                for one in read.changes
            ]
            return p.Watched(message.id, read.next, read.lost, changes)

        return answer()

    async def _wait(self, holder: Holder, since: int, wait_s: float) -> None:
        if holder.num_watches >= MOST_OF_ONE:
            raise UsageError(f"{MOST_OF_ONE} of this process wait for changes already")
        holder.num_watches += 1
        try:
            await self.journal.wait(since, wait_s)
        finally:
            holder.num_watches -= 1


def _what(key: bytes, cause: Cause | None) -> str:
    if cause is None:
        return ENTERED
    return cause.value if key else EMPTIED
