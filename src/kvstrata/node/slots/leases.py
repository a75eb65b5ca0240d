"""Leases: rows of slots held still for a reader, and what has become of those being filled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvstrata.node.slots.boundaries import Stretch, spread
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Row, Slot, offsets_of_rows


class Lease:
    """Leading chunks of one prompt, held still; some may still be arriving.

    ``rows`` are those of its chunks, in order. ``ready`` counts the leading ones whose objects all
    lie in host memory, in an order the client reads; ``failed`` says that the next will not come.
    It is ``whole`` once its match has ended, and nothing is added to it any more.

    With a ``shape`` it is of what a ``boundary`` needs, ``width`` parts a chunk, and of use only
    whole: whatever will not come makes it fail at once, and nothing of it counts as ready. What was
    added behind the boundary can be let go of again.
    """

    __slots__ = ("boundary", "client", "failed", "id", "listeners", "orders", "ready", "rows",
                 "shape", "whole", "width")  # fmt: skip

    def __init__(
        self,
        id: int,
        client: Client,
        orders: frozenset[str],
        shape: Sequence[Stretch] = (),
        width: int = 0,
    ) -> None:
        self.id = id
        self.client = client
        self.orders = orders
        self.shape, self.width = shape, width
        self.boundary = shape[-1].stop if shape else 0
        self.rows: list[Row] = []
        self.ready = 0
        self.failed = self.whole = False
        # whether one who waits can be told something, and what tells it
        self.listeners: list[tuple[Callable[[], bool], Callable[[], None]]] = []

    @property
    def num_chunks(self) -> int:
        """Number of chunks still leased."""
        return len(self.rows)

    def extend(self, rows: Sequence[Row], *, here: bool = False) -> None:
        """Let further chunks belong to it.

        Args:
            rows: of the chunks.
            here: whether each is known to be filled, in an order that its reader reads.
        """
        if here and self.ready == len(self.rows) and not (self.failed or self.listeners):
            self.rows += rows
            self.ready += len(rows)
            return
        self.rows += rows
        for row in rows:
            if row.num_filling:
                row.watchers.append(partial(self._hear, row) if self.shape else self.advance)
        self.advance()

    def advance(self) -> None:
        """Count on after a row was filled or failed, and tell who listens."""
        orders, rows, place = self.orders, self.rows, self.ready
        while place < len(rows) and not self.failed:
            row = rows[place]
            # An object that goes away while it is leased (a clear) still has its bytes.
            if row.failed:
                self.failed = True
            elif row.num_filling:
                break
            elif row.order in orders or row.in_orders(orders):
                place += 1
            else:
                self.failed = True
        self.ready = 0 if self.failed and self.shape else place
        if self.listeners:
            waiting, self.listeners = self.listeners, []
            for settled, tell in waiting:
                if settled():
                    tell()
                else:
                    self.listeners.append((settled, tell))

    def _hear(self, row: Row) -> None:
        self.failed = self.failed or (row.failed and row in self.rows)
        self.advance()

    def offsets(self, start: int, stop: int) -> bytes:
        """Of the objects of some of its chunks, see `Row.packed_offsets` and `spread`."""
        if self.shape:
            stop = min(stop, len(self.rows))
            return spread(self.rows, start, stop, self.shape, self.width, self.orders)
        return offsets_of_rows(self.rows[start:stop], self.orders)

    def settled(self, have: int) -> bool:
        """Whether a client that has ``have`` chunks can be told something new, or the end."""
        return self.ready > have or self.failed or self.ready >= self.num_chunks

    # for one who has its last chunks first

    def settled_before(self, first: int) -> bool:
        """Whether a client that has the chunks from ``first`` on can be told something new."""
        return not 0 < first <= len(self.rows) or self._ended(self.rows[first - 1])

    def first_before(self, first: int) -> int:
        """The first of those chunks right before ``first`` that are in host memory."""
        place = first
        while 0 < place <= len(self.rows) and self._is_here(self.rows[place - 1]):
            place -= 1
        return place

    def fails_before(self, first: int) -> bool:
        """Whether the chunk before ``first`` will not come, or is not of this lease."""
        if not 0 < first <= len(self.rows):
            return True
        row = self.rows[first - 1]
        return self._ended(row) and not self._is_here(row)

    def _ended(self, row: Row) -> bool:
        return row.failed or not row.num_filling

    def _is_here(self, row: Row) -> bool:
        """Whether all of a chunk is in host memory, as the client reads it."""
        if row.failed or row.num_filling:
            return False
        return row.order in self.orders or row.in_orders(self.orders)


class LeaseTable:
    """All leases of the node, with the caps on what they may hold.

    However many leases hold a row, its bytes count once, for the process that leased it first:
    a crowd of requests for one document holds no more than one of them. What is being promoted
    goes on to count when nobody wants it any more, until it has been stopped or has come.

    Args:
        host: whose slots they hold.
        per_client_bytes: what the leases of one process may hold.
        total_bytes: what all leases together may hold.
    """

    def __init__(self, host: HostMemory, per_client_bytes: int, total_bytes: int) -> None:
        self._host = host
        self.per_client_bytes = per_client_bytes
        self.total_bytes = total_bytes
        self.leased_bytes = 0
        self._cap_bytes = 0  # on all together, when something was charged last
        self._leases: dict[int, Lease] = {}
        # No number means anything to another node, where a client may come with an old one.
        self._next = int.from_bytes(os.urandom(6), "little") + 1

    def __len__(self) -> int:
        return len(self._leases)

    def room_for(self, client: Client) -> int:
        """Bytes that nobody has leased and that one more lease of this client may hold."""
        return min(
            self.per_client_bytes - client.leased_bytes, self.total_bytes - self.leased_bytes
        )

    def __getitem__(self, id: int) -> Lease:
        return self._leases[id]

    def get(self, id: int) -> Lease | None:
        """A lease by its number."""
        return self._leases.get(id)

    def grant(
        self,
        client: Client,
        orders: frozenset[str],
        shape: Sequence[Stretch] = (),
        width: int = 0,
    ) -> Lease:
        """A new lease for a reader of these byte orders; of nothing, until it is extended."""
        lease = Lease(self._next, client, orders, shape, width)
        self._next += 1
        self._leases[lease.id] = lease
        client.leases.add(lease.id)
        return lease

    def extend(self, lease: Lease, rows: Sequence[Row], *, here: bool = False) -> None:
        """Hold these rows still, too; see `Lease.extend`."""
        charged = 0
        for row in rows:
            if row.num_leases == 0:
                if row.payer is None:
                    row.payer = lease.client.holder
                    charged += row.nbytes
                if row.num_filling or not row.kept:
                    self._host.pin(row)
            row.num_leases += 1
        if charged:
            lease.client.holder.leased_bytes += charged
            lease.client.holder.leased_cap_bytes = self.per_client_bytes
            self.leased_bytes += charged
            self._cap_bytes = self.total_bytes
        lease.extend(rows, here=here)

    def release(self, lease: Lease, keep: int = 0) -> list[Slot]:
        """End a lease but for its first ``keep`` chunks; repeatable.

        Returns:
            The slots whose promotion nobody waits for any more.
        """
        unwanted: list[Slot] = []
        if self._leases.get(lease.id) is not lease:
            return unwanted
        keep = max(0, keep)
        dropped, lease.rows = lease.rows[keep:], lease.rows[:keep]
        freed = 0  # summed up: of thousands of rows a call for each shows
        for row in dropped:
            row.num_leases -= 1
            if row.num_leases == 0:
                if row.num_under_way:
                    unwanted += [
                        slot
                        for slot in row.slots
                        if slot.rows is not None and (len(slot.rows) == 1 or not is_wanted(slot))
                    ]
                elif (payer := row.payer) is not None:
                    payer.leased_bytes -= row.nbytes
                    freed += row.nbytes
                    row.payer = None
                if row.pinned or row.passed_over is not None:
                    self._host.let_go(row)
        self.leased_bytes -= freed
        if not lease.rows:
            del self._leases[lease.id]
            lease.client.leases.discard(lease.id)
        elif lease.shape:
            lease.failed = any(row.failed for row in lease.rows)
        lease.ready = min(lease.ready, lease.num_chunks)
        lease.failed = lease.failed and lease.ready < lease.num_chunks
        lease.advance()
        return unwanted

    def promotion_ended(self, slot: Slot) -> None:
        """Nothing writes into a slot any more that was being promoted."""
        rows, slot.rows = slot.rows or (), None
        for row in rows:
            row.num_under_way -= 1
            if not row.num_under_way and not row.num_leases and row.payer is not None:
                self._discharge(row)

    def check_integrity(self, promoting: Iterable[Slot] = ()) -> None:
        """Raise AssertionError unless every lease is counted once, within the caps of its time.

        Args:
            promoting: the slots whose promotion has not ended.
        """
        counts: dict[Row, int] = {}
        for lease in self._leases.values():
            assert lease.rows
            assert lease.id in lease.client.leases
            for row in lease.rows:
                counts[row] = counts.get(row, 0) + 1
        for slot in promoting:
            assert slot.rows is not None
            for row in slot.rows:
                assert slot in row.slots
                assert row.num_under_way > 0
                counts.setdefault(row, 0)
        charged: dict[Holder, int] = {}
        for row, count in counts.items():
            assert row.num_leases == count
            assert row.num_under_way == sum(slot.rows is not None for slot in row.slots)
            assert row.pinned or (row.kept and not row.num_filling) or not count
            assert not row.pinned or all(slot.holds > 0 for slot in row.slots)
            assert row.payer is not None
            charged[row.payer] = charged.get(row.payer, 0) + row.nbytes
        for holder, nbytes in charged.items():
            assert holder.leased_bytes == nbytes <= holder.leased_cap_bytes
        assert sum(charged.values()) == self.leased_bytes <= self._cap_bytes

    def _discharge(self, row: Row) -> None:
        assert row.payer is not None
        row.payer.leased_bytes -= row.nbytes
        self.leased_bytes -= row.nbytes
        row.payer = None


def is_wanted(slot: Slot) -> bool:
    """Whether anybody leases what is being promoted into this slot."""
    return any(row.num_leases for row in slot.rows or ())
