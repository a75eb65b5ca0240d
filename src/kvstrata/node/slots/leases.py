"""Leases: slots held still for a reader, and what has become of those still being filled."""

from __future__ import annotations

import os
from collections.abc import Callable

from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot, SlotState


class Lease:
    """Leading chunks of one prompt, held still; some may still be arriving.

    ``slots`` is flat: the objects of chunk 0, then those of chunk 1, ``num_parts`` each.
    ``ready`` counts the leading chunks whose objects all lie in host memory, in an order the
    client reads; ``failed`` says that the chunk behind them will not come.
    """

    __slots__ = ("client", "failed", "id", "listeners", "num_parts", "orders", "ready", "slots")

    def __init__(
        self, id: int, client: Client, slots: list[Slot], num_parts: int, orders: frozenset[str]
    ) -> None:
        self.id = id
        self.client = client
        self.slots = slots
        self.num_parts = num_parts
        self.orders = orders
        self.ready = 0
        self.failed = False
        self.listeners: list[tuple[int, Callable[[], None]]] = []
        for slot in slots:
            if slot.state is SlotState.FILLING:
                if slot.waiters is None:
                    slot.waiters = []
                slot.waiters.append(self.advance)
        self.advance()

    @property
    def num_chunks(self) -> int:
        """Number of chunks still leased."""
        return len(self.slots) // self.num_parts

    def advance(self) -> None:
        """Count on after a slot was filled or failed, and tell who listens."""
        place = self.ready * self.num_parts
        while place < len(self.slots) and not self.failed:
            # An object that goes away while it is leased (a clear) still has its bytes, and its
            # order; one that never came has none.
            slot = self.slots[place]
            if slot.state is SlotState.FILLING:
                break
            if slot.order not in self.orders:
                self.failed = True
            else:
                place += 1
        self.ready = place // self.num_parts
        waiting, self.listeners = self.listeners, []
        for have, tell in waiting:
            if self.settled(have):
                tell()
            else:
                self.listeners.append((have, tell))

    def settled(self, have: int) -> bool:
        """Whether a client that has ``have`` chunks can be told something new, or the end."""
        return self.ready > have or self.failed or self.ready >= self.num_chunks


class LeaseTable:
    """All leases of the node, with the caps on what they may hold.

    However many leases hold a slot, its bytes count once, for the client that leased it first:
    a crowd of requests for one document holds no more than one of them.

    Args:
        host: whose slots they hold.
        per_client_bytes: what one client's leases may hold.
        total_bytes: what all leases together may hold.
    """

    def __init__(self, host: HostMemory, per_client_bytes: int, total_bytes: int) -> None:
        self._host = host
        self.per_client_bytes = per_client_bytes
        self.total_bytes = total_bytes
        self.leased_bytes = 0
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
        self, client: Client, slots: list[Slot], num_parts: int, orders: frozenset[str]
    ) -> Lease:
        """Lease slots that the caller already holds; the holds become the lease's."""
        lease = Lease(self._next, client, slots, num_parts, orders)
        self._next += 1
        self._leases[lease.id] = lease
        client.leases.add(lease.id)
        charged = 0
        for slot in slots:
            if slot.num_leases == 0:
                slot.payer = client
                charged += slot.nbytes
            slot.num_leases += 1
        client.leased_bytes += charged
        self.leased_bytes += charged
        return lease

    def release(self, lease: Lease, keep: int = 0) -> None:
        """End a lease but for its first ``keep`` chunks; repeatable."""
        if self._leases.get(lease.id) is not lease:
            return
        cut = max(0, min(keep, lease.num_chunks)) * lease.num_parts
        dropped, lease.slots = lease.slots[cut:], lease.slots[:cut]
        for slot in dropped:
            slot.num_leases -= 1
            if slot.num_leases == 0:
                assert slot.payer is not None
                slot.payer.leased_bytes -= slot.nbytes
                self.leased_bytes -= slot.nbytes
                slot.payer = None
        self._host.unhold_all(dropped)
        if not lease.slots:
            del self._leases[lease.id]
            lease.client.leases.discard(lease.id)
        lease.ready = min(lease.ready, lease.num_chunks)
        lease.failed = lease.failed and lease.ready < lease.num_chunks
        lease.advance()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every lease is counted once, within its caps."""
        counts: dict[Slot, int] = {}
        for lease in self._leases.values():
            assert lease.id in lease.client.leases
            for slot in lease.slots:
                assert slot.holds > 0
                counts[slot] = counts.get(slot, 0) + 1
        charged: dict[Client, int] = {}
        for slot, count in counts.items():
            assert slot.num_leases == count
            assert slot.payer is not None
            charged[slot.payer] = charged.get(slot.payer, 0) + slot.nbytes
        for client, nbytes in charged.items():
            assert client.leased_bytes == nbytes <= self.per_client_bytes
        assert sum(charged.values()) == self.leased_bytes <= self.total_bytes
