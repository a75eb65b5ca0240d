"""Host memory: the slots of the pool, who holds them still, and what makes room.

A slot is allocated, filled (by a client that reserved it, or by a promotion), and published; from
then on it can be leased and evicted. Whatever happens, its bytes go back to the allocator only
when nobody holds the slot any more: an eviction, a clear or a failure only marks it gone.

Readers lease rows. The row of a chunk is kept as long as the chunk stays as it is, and leasing it
keeps the chunk from being evicted. Once the chunk changes, the row is forgotten; one that is leased
is pinned first, so that it keeps its slots while others take their place.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvstrata.header import NOBODY
from kvstrata.memory.allocator import SlotAllocator
from kvstrata.memory.pool import Pool
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.common.owners import Account
from kvstrata.node.slots.quotas import HostQuotas
from kvstrata.node.slots.room import chunks_to_drop
from kvstrata.node.slots.slot import Row, Slot, SlotState
from kvstrata.objects import CREATED_FIELD
from kvstrata.observe.counters import Counters
from kvstrata.policies.base import Policy
from kvstrata.tables import Table
from kvstrata.tiers.marks import UNKNOWN, Whose

Rows = dict[tuple[int, ...], Table[Row]]
"""By parts, and then by chunk."""

_NO_ROWS = Table[Row]()

MAX_SHAPES = 16
"""Sets of parts whose rows are kept; those of further ones are made for each lease."""

ASKED_PER_CHANGE = 64
"""A search in vain is not repeated before something has changed for every so many chunks that it
looked at: a pool in which nothing fits must not be searched for each request."""


class HostMemory:
    """The pool's slots and the index of those that are ready.

    Args:
        pool: where the bytes are.
        policy: orders chunks for eviction.
        counters: the node's.
    """

    def __init__(self, pool: Pool, policy: Policy, counters: Counters | None = None) -> None:
        self.pool = pool
        self.index: Index[Slot] = Index(pool.capacity_bytes, policy, lambda slot: slot.nbytes)
        self.num_evicted = 0
        self.quotas = HostQuotas(
            self.index.owners, self.index.takes, self._evict_one_of, counters or Counters()
        )
        self._allocator = SlotAllocator(pool.capacity_bytes)
        # Allocated but not in the index: being filled, or gone and still held.
        self._loose: set[Slot] = set()
        self._rows: Rows = {}
        # What was cleared and has not been given back: its chunks, and the rows there were.
        self._leaving: deque[tuple[Iterator[tuple[bytes, tuple[object, ...]]], Rows]] = deque()
        self._spared: set[bytes] = set()
        self._spared_once: list[bytes] = []
        # The size that nothing could make room for, how many chunks were looked at for it, and how
        # much has to change before that many are looked at again.
        self._no_room_for = pool.capacity_bytes + 1
        self._num_asked = 0
        self._patience = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool in use, held ones that are gone included."""
        return self._allocator.allocated_bytes

    def get(self, key: bytes, part: int) -> Slot | None:
        """The ready slot of an object."""
        return self.index.get(key, part)

    def rows_of(self, parts: tuple[int, ...]) -> Table[Row]:
        """The rows of these parts that are known, by chunk; to be read only."""
        return self._rows.get(parts, _NO_ROWS)

    def row(self, key: bytes, parts: tuple[int, ...], slots: Sequence[Slot]) -> Row:
        """The row of a chunk's parts, whose slots are those that are ready or being promoted."""
        rows = self._rows.get(parts)
        if rows is None:
            if len(self._rows) >= MAX_SHAPES:
                self._rows = {shape: rows for shape, rows in self._rows.items() if rows}
            if len(self._rows) >= MAX_SHAPES:
                return Row(slots)
            rows = self._rows[parts] = Table()
        row = rows.get(key)
        if row is None:
            row = rows[key] = Row(slots)
            row.kept = True
        return row

    def ready_row(self, key: bytes, parts: tuple[int, ...]) -> Row | None:
        """The row of a chunk's parts if all of them are ready."""
        ready = dict(self.index.objects(key))
        slots = [ready[part] for part in parts if part in ready]
        return self.row(key, parts, slots) if len(slots) == len(parts) else None

    def forget_rows(self, key: bytes, but_of: Slot | None = None) -> None:
        """A chunk has changed, or will: pin what is leased of it, and lease nothing as it was.

        Args:
            key: of the chunk.
            but_of: rows with this slot in them stay.
        """
        for rows in self._rows.values():
            row = rows.get(key)
            if row is not None and (but_of is None or but_of not in row.slots):
                del rows[key]
                self._forget_row(row)

    def _forget_row(self, row: Row) -> None:
        row.kept = False
        if row.num_leases:
            self.pin(row)

    def pin(self, row: Row) -> None:
        """Hold each slot of a row until `let_go`."""
        if not row.pinned:
            row.pinned = True
            for slot in row.slots:
                slot.holds += 1

    def let_go(self, row: Row) -> None:
        """The last lease of a row has ended."""
        if row.passed_over is not None:
            self.index.unpark(row.passed_over)
            row.passed_over = None
            self._note_change()
        if row.pinned:
            row.pinned = False
            for slot in row.slots:
                self.unhold(slot)

    @contextmanager
    def sparing(self, keys: set[bytes]) -> Iterator[None]:
        """Evict none of these chunks in here: a prompt's tail must not cost it its head."""
        self._spared = keys
        try:
            yield
        finally:
            for key in self._spared_once:
                self.index.unpark(key)
            self._spared, self._spared_once = set(), []

    def allocate(self, nbytes: int, owner: bytes = NOBODY) -> Slot | None:
        """A slot to fill, see `allocate_many`; None if there is no room."""
        slots = self.allocate_many(nbytes, 1, owner)
        return slots[0] if slots else None

    def allocate_many(self, nbytes: int, count: int, owner: bytes = NOBODY) -> list[Slot]:
        """Slots to fill, each held once by the caller, as many as there is room for.

        Evicts what it must, first of the owner's own where a quota says so; nothing for a slot
        that will not fit even so.

        Args:
            nbytes: of each whole object.
            count: how many at most.
            owner: whose the objects will be, 16 bytes.
        """
        slots: list[Slot] = []
        account = self.index.owners.account(owner)
        count = self.quotas.within(account, nbytes, count)
        searched = nbytes >= self._no_room_for
        while len(slots) < count:
            offset = self._allocator.allocate(nbytes)
            if offset is not None:
                slot = Slot(offset, nbytes)
                slot.holds = 1
                slot.account = account
                slots.append(slot)
            elif self._leaving:
                self.give_back(count)
            elif self._drop_spare():
                continue
            elif searched:
                break
            else:
                searched = True
                self._make_room(nbytes, count - len(slots))
        self._loose.update(slots)
        self.index.owners.fill(account, nbytes * len(slots))
        self.index.owners.settle(account)
        return slots

    def _evict_one_of(self, account: Account) -> bool:
        """Evict the next chunk of an owner who has a quota; False if none may go."""
        victim = self.index.victim_of(account, self._evictable)
        if victim is None:
            return False
        self.num_evicted += 1
        self.drop(victim, Cause.EVICTED)
        return True

    def is_held(self, key: bytes) -> bool:
        """Whether somebody needs a chunk's bytes to stay."""
        rows = [of.get(key) for of in self._rows.values()]
        if any(row is not None and row.num_leases for row in rows):
            return True
        return any(slot.holds for _, slot in self.index.objects(key))

    def created_ns(self, slot: Slot) -> int:
        """When the object in a ready slot was created, nanoseconds since 1970."""
        view = self.pool.view(slot.offset, CREATED_FIELD.stop)
        return int.from_bytes(view[CREATED_FIELD], "little")

    def publish(
        self,
        key: bytes,
        part: int,
        slot: Slot,
        order: str,
        cost: float = 0.0,
        whose: Whose = UNKNOWN,
        priority: int = 0,
    ) -> None:
        """Make a filled slot readable; the caller's hold stays. `Index.put` tells of the rest."""
        assert slot.state is SlotState.FILLING
        slot.order = order
        slot.state = SlotState.READY
        self._loose.discard(slot)
        self._note_change()
        fits = self.index.claim(slot.nbytes)
        assert fits, "the allocator gave more than the pool has"
        self.forget_rows(key, but_of=slot)
        self._filled(slot)
        replaced = self.index.put(key, part, slot, cost, whose, priority)
        if replaced is not None:
            self._retire(replaced)

    def discard(self, slot: Slot) -> None:
        """Give up a slot that was never published; the caller's hold stays."""
        assert slot.state is SlotState.FILLING
        slot.state = SlotState.GONE
        self._filled(slot)

    def _filled(self, slot: Slot) -> None:
        """Nobody fills it any more."""
        if slot.account is not None:
            self.index.owners.fill(slot.account, -slot.nbytes)
            slot.account = None

    def hold(self, slot: Slot) -> None:
        """Keep the slot's bytes where they are."""
        slot.holds += 1

    def unhold(self, slot: Slot) -> None:
        """End one hold; the last one frees a slot that is gone, and lets the others be evicted."""
        assert slot.holds > 0
        slot.holds -= 1
        if slot.holds == 0:
            if slot.passed_over is not None:
                self.index.unpark(slot.passed_over)
                slot.passed_over = None
                self._note_change()
            if slot.state is SlotState.GONE:
                self._free(slot)

    def drop(self, key: bytes, cause: Cause) -> int:
        """Forget a chunk; returns the number of its objects."""
        self.forget_rows(key)
        objects = self.index.pop_chunk(key, cause)
        for _, slot in objects:
            self._retire(slot)
        return len(objects)

    def drop_object(self, key: bytes, part: int, cause: Cause) -> None:
        """Forget one object."""
        self.forget_rows(key)
        slot = self.index.pop(key, part, cause)
        if slot is not None:
            self._retire(slot)

    def clear(self) -> int:
        """Forget everything, now; how many objects. `give_back` frees their bytes."""
        count = self.index.num_objects
        rows, self._rows = self._rows, {}
        self._leaving.append((self.index.clear(), rows))
        return count

    def give_back(self, num_chunks: int) -> bool:
        """Free the bytes of so many chunks that were cleared; whether there were any left."""
        while self._leaving and num_chunks > 0:
            chunks, shapes = self._leaving[0]
            for key, flat in itertools.islice(chunks, num_chunks):
                num_chunks -= 1
                for rows in shapes.values():
                    if (row := rows.get(key)) is not None:
                        self._forget_row(row)
                for slot in flat[2::2]:
                    assert isinstance(slot, Slot)
                    self.index.unclaim(slot.nbytes)
                    self._retire(slot)
            if num_chunks > 0:
                self._leaving.popleft()
        return bool(self._leaving)

    def check_integrity(self, fillers: Iterable[Slot] = ()) -> None:
        """Raise AssertionError unless every byte of the pool is accounted for.

        Args:
            fillers: the slots that reservations and promotions say they are filling.
        """
        self._allocator.check_integrity()
        self.index.check_integrity()
        loose = sum(slot.nbytes for slot in self._loose)
        assert self.index.used_bytes + loose == self.allocated_bytes, (
            f"{self.index.used_bytes} indexed + {loose} loose != {self.allocated_bytes} allocated"
        )
        for slot in self._loose:
            assert slot.state is not SlotState.READY
            assert slot.holds > 0, "a slot that nobody holds was not freed"
        for parts, rows in self._rows.items():
            for key, row in rows.items():
                assert row.kept
                assert not row.failed
                assert row.passed_over is None or row.num_leases, "passed over, and not told since"
                for part, slot in zip(parts, row.slots, strict=True):
                    if slot.state is SlotState.FILLING:
                        assert slot.rows is not None
                        assert row in slot.rows
                    else:
                        assert self.index.get(key, part) is slot, (
                            "a row of slots that are not there"
                        )
        for key in list(self.index.keys()):
            for _, slot in self.index.objects(key):
                assert slot.passed_over is None or slot.holds, "passed over, and not told since"
        filling = {slot for slot in self._loose if slot.state is SlotState.FILLING}
        for account in self.index.owners:
            mine = [slot.nbytes for slot in filling if slot.account is account]
            assert account.filling_bytes == sum(mine), "what an owner fills is not counted"
        assert filling == set(fillers), "a slot is being filled by nobody, or twice"

    def close(self) -> None:
        """Let go of the pool."""
        self.pool.close()

    def _make_room(self, nbytes: int, count: int) -> None:
        need = self._allocator.rounded(nbytes)
        self._num_asked = 0
        chosen = chunks_to_drop(self.index, self._allocator, self._evictable, need, count)
        for key in chosen:
            self.num_evicted += 1
            self.drop(key, Cause.EVICTED)
        patience = self._num_asked // ASKED_PER_CHANGE - len(self._spared_once)
        if not chosen and patience > 0:
            self._no_room_for, self._patience = nbytes, patience

    def _drop_spare(self) -> bool:
        """Evict an object that no match has come to need, if there is one that may go."""
        later: list[tuple[bytes, int]] = []
        try:
            while (spare := self.index.spare()) is not None:
                key, part = spare
                slot = self.index.get(key, part)
                if key in self._spared:
                    later.append(spare)
                elif slot is not None and not slot.holds and not self._is_leased(key, slot):
                    self.drop_object(key, part, Cause.EVICTED)
                    return True
            return False
        finally:
            for spare in later:
                self.index.spares.pass_over(spare)

    def _is_leased(self, key: bytes, slot: Slot) -> bool:
        rows = [shape[key] for shape in self._rows.values() if key in shape]
        return any(row.num_leases and slot in row.slots for row in rows)

    def _note_change(self) -> None:
        """Something may be free, or evictable, that was not."""
        self._patience -= 1
        if self._patience <= 0:
            self._no_room_for = self.pool.capacity_bytes + 1

    def _evictable(self, key: bytes) -> bool:
        self._num_asked += 1
        if key in self._spared:
            self._spared_once.append(key)
            return False
        for rows in self._rows.values():
            row = rows.get(key)
            if row is not None and row.num_leases:
                row.passed_over = key
                return False
        for _, slot in self.index.objects(key):
            if slot.holds:
                slot.passed_over = key
                return False
        return True

    def _retire(self, slot: Slot) -> None:
        slot.state = SlotState.GONE
        self._loose.add(slot)
        if slot.holds == 0:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        self._loose.discard(slot)
        self._allocator.free(slot.offset)
        self._note_change()
