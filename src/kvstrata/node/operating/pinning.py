"""Pins: chunks that are to stay, until their time is over, somebody lets go, or they are cleared.

A pinned chunk stays in the slower tiers that are the node's own, wherever it is or comes to be, and
in host memory as long as none of those keeps it. So it is demoted like any other, and never lost.
What is pinned has a bound in every tier, for each owner and in all.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from kvstrata.errors import UsageError
from kvstrata.node.common.background import Tasks
from kvstrata.node.common.changes import Cause
from kvstrata.node.common.index import Index
from kvstrata.node.common.pinned import Pinned
from kvstrata.node.common.slices import Work, in_slices
from kvstrata.node.common.spares import Name
from kvstrata.node.operating.copying import taken_in
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.ledger import Pin, Unpin, together
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.slots.host import HostMemory
from kvstrata.observe.counters import Counters
from kvstrata.wire import protocol as p

MAX_PINS = 4096
MAX_PINNED_CHUNKS = 1 << 17
"""Keys of all pins together."""
MAX_PINS_OF_OWNER = 1024
MAX_CHUNKS_OF_OWNER = 1 << 15
"""Clients may pin, too, and no tenant's may leave nothing to the others."""
MAX_TTL_S = 366 * 86400.0
MAX_NAME_CHARS = 128
MAX_PAGE = 256
SLICE = 32
EXPIRE_S = 1.0
NOT_KEPT = "not kept: this store evicts by its own rules, and has no pin for what is there already"

Id = tuple[bytes, str]
R = TypeVar("R")


class Pinning:
    """The pins of a node; it watches what comes into its tiers and leaves them.

    Args:
        host: host memory.
        backings: the slower tiers.
        per_owner: of each tier's capacity, what may be pinned for one owner.
        total: of it, what may be pinned in all.
        counters: the node's.
        wall: Unix seconds.
    """

    def __init__(
        self,
        host: HostMemory,
        backings: Sequence[Backing],
        per_owner: Fraction,
        total: Fraction,
        counters: Counters,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._backings = backings
        self._owned = [one for one in backings if isinstance(one, OwnedBacking)]
        self._wall = wall
        self._tasks = Tasks(counters)
        self._pins: dict[Id, Pin] = {}
        self._wanted: dict[bytes, list[Pin]] = {}
        self._gone: set[bytes] = set()
        self._num_keys = 0
        self._busy = asyncio.Lock()
        for index in self._indexes():
            capacity = index.capacity_bytes
            index.pinned = Pinned(int(total * capacity), int(per_owner * capacity))
        self._remember()

    def __len__(self) -> int:
        return len(self._pins)

    # what an operator asks

    def pin(self, message: p.Pin) -> Awaitable[p.Pinned]:
        """Keep chunks from now on, or a pin of this name for longer, or for others.

        Awaiting it raises:
            UsageError: it asks for what cannot be.
            TierUnavailable: the pin holds, and a tier could not write it down.
        """
        _check(message)
        return self._pin(message)

    async def _pin(self, message: p.Pin) -> p.Pinned:
        until_s = self._wall() + message.ttl_s
        keys = b"".join(await taken_in(message.keys))
        pin = Pin(message.owner, message.name, keys, until_s)
        async with self._busy:
            before = self._pins.get(pin.id)
            num_keys = self._num_keys + (len(pin.keys) - len(before.keys if before else b"")) // 32
            if num_keys > MAX_PINNED_CHUNKS:
                raise UsageError(f"{num_keys} pinned chunks; {MAX_PINNED_CHUNKS} at most")
            if before is None and len(self._pins) >= MAX_PINS:
                raise UsageError(f"there are {MAX_PINS} pins, which is all there may be")
            self._check_owner(pin)
            await _done(in_slices(self._want(pin)))
            if before is not None:
                await _done(in_slices(self._want_no_more(before)))
            for backing in self._owned:
                backing.ledger.note(pin)
            tiers = await _done(in_slices(self._held(pin)))
        await self.save()
        names = {"host", *(one.name for one in self._owned)}
        notes = {one.name: NOT_KEPT for one in self._backings if one.name not in names}
        return p.Pinned(message.id, len(pin.keys) // 32, tiers.pop(""), tiers, notes)

    def _check_owner(self, pin: Pin) -> None:
        """Raises `UsageError` for one more than its owner may have."""
        others = [one for one in self._pins.values() if one.owner == pin.owner and one.id != pin.id]
        if len(others) >= MAX_PINS_OF_OWNER:
            raise UsageError(f"its owner has {MAX_PINS_OF_OWNER} pins, which is all one may have")
        num_keys = sum(len(one.keys) for one in (*others, pin)) // 32
        if num_keys > MAX_CHUNKS_OF_OWNER:
            raise UsageError(f"{num_keys} pinned chunks; {MAX_CHUNKS_OF_OWNER} of one owner's")

    async def unpin(self, message: p.Unpin) -> p.Done:
        """End a pin; how many chunks it had, 0 where there is none.

        Raises:
            TierUnavailable: it has ended, and a tier could not write that down.
        """
        async with self._busy:
            count = await self._end(self._pins.get((message.owner, message.name)))
        await self.save()
        return p.Done(message.id, count)

    def page(self, message: p.Pins) -> p.PinPage | Awaitable[p.PinPage]:
        """The pins behind a place in their order, as many as a page has."""
        if not 1 <= message.limit <= MAX_PAGE:
            raise UsageError(f"a page of {message.limit} pins, not 1 to {MAX_PAGE}")
        places = sorted((_place(id), pin) for id, pin in self._pins.items())
        rest = [(place, pin) for place, pin in places if place > message.after]

        def work() -> Work[p.PinPage]:
            states, after = [], b""
            for place, pin in rest[: message.limit]:
                tiers = yield from self._held(pin)
                count = len(pin.keys) // 32
                states.append(p.PinState(pin.owner, pin.name, count, tiers[""], pin.until_s))
                after = place
            more = len(rest) > message.limit
            return p.PinPage(message.id, states, after if more else b"")

        return in_slices(work())

    # what ends pins

    async def run(self) -> None:
        """End pins whose time is over."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            await self.expire()

    async def expire(self) -> None:
        """End those whose time is over now; what a tier cannot write down it does later.

        And what reads have found to be cleared since, which nobody waited for.
        """
        await self.cleared(self.take_gone())
        now = self._wall()
        async with self._busy:
            for pin in [pin for pin in self._pins.values() if pin.until_s <= now]:
                await self._end(pin)

    async def cleared(self, keys: Iterable[bytes] | None, owner: bytes = b"") -> bool:
        """End pins, or what they have of some chunks, since these were cleared.

        Args:
            keys: of the chunks; None: all of them.
            owner: only the pins of this one, 16 bytes; empty: of anybody.
        Returns:
            Whether there were any, so that there is something to `save`.
        """
        gone, ended = None if keys is None else set(keys), False
        if not self._pins or gone == set():
            return False
        async with self._busy:
            for pin in list(self._pins.values()):
                if owner not in (b"", pin.owner):
                    continue
                left = b"" if gone is None else await _done(in_slices(_without(pin, gone)))
                ended = ended or len(left) < len(pin.keys)
                if not left:
                    await self._end(pin)
                elif len(left) < len(pin.keys):
                    fewer = Pin(pin.owner, pin.name, left, pin.until_s)
                    await _done(in_slices(self._want(fewer)))
                    await _done(in_slices(self._want_no_more(pin)))
                    for backing in self._owned:
                        backing.ledger.note(fewer)
        return ended

    async def save(self) -> None:
        """Write down which pins there are.

        Raises:
            TierUnavailable: they hold, and a tier could not write them down.
        """
        await together(backing.save() for backing in self._owned)

    # what happens in the tiers, see `Watcher`

    def entered(self, tier: str, key: bytes, part: int) -> None:
        if key in self._wanted:
            self._guard(key)

    def found(self, tier: str, names: Sequence[Name]) -> None:
        for key in self._wanted and self._wanted.keys() & {key for key, _ in names}:
            self._guard(key)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        if key in self._wanted:
            self._guard(key)
            if cause is Cause.CLEARED and not any(key in index for index in self._indexes()):
                self._gone.add(key)

    def emptied(self, tier: str) -> None:
        # What one tier kept another may have to keep now.
        if self._wanted:
            self._tasks.spawn("a look at the pins", self._guard_all(list(self._wanted)))

    def take_gone(self) -> set[bytes]:
        """Chunks that clears took away since this was asked, the last copy that the node had."""
        gone, self._gone = self._gone, set()
        return gone

    # laws

    def check_integrity(self) -> None:
        """Raise AssertionError unless what is kept is wanted, and its count is right."""
        assert self._num_keys == sum(len(pin.keys) // 32 for pin in self._pins.values())
        for key, pins in self._wanted.items():
            assert pins, f"{key.hex()} is wanted by nobody"
        for index in self._indexes():
            assert all(key in self._wanted for key in index.pinned), "kept, and wanted by nobody"

    # how

    def _indexes(self) -> list[Index[object]]:
        return [self._host.index, *(backing.index for backing in self._owned)]  # type: ignore[list-item]

    def _remember(self) -> None:
        """The pins of earlier processes, as any tier has them: the one that lasts longest."""
        for backing in self._owned:
            for pin in backing.ledger.pins.values():
                known = self._pins.get(pin.id)
                fits = self._num_keys + len(pin.keys) // 32 <= MAX_PINNED_CHUNKS
                if len(self._pins) >= MAX_PINS or not fits or len(pin.keys) % 32:
                    continue
                if known is None or known.until_s < pin.until_s:
                    self._forget(known)
                    self._pins[pin.id] = pin
                    self._num_keys += len(pin.keys) // 32
                    for key in p.split(pin.keys, 32):
                        self._wanted.setdefault(key, []).append(pin)
        for pin in self._pins.values():
            for backing in self._owned:
                if backing.ledger.pins.get(pin.id) != pin:
                    backing.ledger.note(pin)

    def _forget(self, pin: Pin | None) -> None:
        if pin is not None:
            for _ in self._want_no_more(pin):
                pass

    def _want(self, pin: Pin) -> Work[None]:
        self._pins[pin.id] = pin
        self._num_keys += len(pin.keys) // 32
        for number, key in enumerate(p.split(pin.keys, 32), 1):
            self._wanted.setdefault(key, []).append(pin)
            self._guard(key)
            if number % SLICE == 0:
                yield None

    def _want_no_more(self, pin: Pin) -> Work[None]:
        self._num_keys -= len(pin.keys) // 32
        for number, key in enumerate(p.split(pin.keys, 32), 1):
            pins = [one for one in self._wanted.pop(key, ()) if one is not pin]
            if pins:
                self._wanted[key] = pins
            self._guard(key)
            if number % SLICE == 0:
                yield None

    async def _end(self, pin: Pin | None) -> int:
        if pin is None:
            return 0
        del self._pins[pin.id]
        for backing in self._owned:
            backing.ledger.note(Unpin(*pin.id))
        await _done(in_slices(self._want_no_more(pin)))
        return len(pin.keys) // 32

    async def _guard_all(self, keys: list[bytes]) -> None:
        for start in range(0, len(keys), SLICE):
            for key in keys[start : start + SLICE]:
                self._guard(key)
            await asyncio.sleep(0)

    def _guard(self, key: bytes) -> None:
        """See to it that a chunk is kept where it should be, and nowhere else."""
        owners = dict.fromkeys(pin.owner for pin in self._wanted.get(key, ()))
        below = False
        for backing in self._owned:
            here = owners if key in backing.index else ()
            below = self._keep(backing.index, key, here) or below  # type: ignore[arg-type]
        parts = {part for part, _ in self._host.index.objects(key)}
        below = below and any(
            key in backing.index.pinned
            and parts <= {part for part, _ in backing.index.objects(key)}
            for backing in self._owned
        )
        self._keep(self._host.index, key, owners if parts and not below else ())  # type: ignore[arg-type]

    def _keep(self, index: Index[object], key: bytes, owners: Iterable[bytes]) -> bool:
        """Keep a chunk in one tier for the first of these who has room for it, or no longer.

        Returns:
            Whether it is kept.
        """
        nbytes, was = index.nbytes(key), index.pinned.let_go(key)
        kept = any(index.pinned.hold(key, owner, nbytes) for owner in owners)
        if was and not kept:
            index.unpark(key)
        return kept

    def _held(self, pin: Pin) -> Work[dict[str, int]]:
        """How many of a pin's chunks each tier keeps; under the empty name, how many any does."""
        kept = {"host": self._host.index.pinned}
        kept |= {backing.name: backing.index.pinned for backing in self._owned}
        counts = dict.fromkeys(("", *kept), 0)
        for number, key in enumerate(p.split(pin.keys, 32), 1):
            names = [name for name, pinned in kept.items() if key in pinned]
            for name in names:
                counts[name] += 1
            counts[""] += bool(names)
            if number % SLICE == 0:
                yield None
        return counts


def _check(message: p.Pin) -> None:
    """Raises `UsageError` unless a pin can be like this."""
    checked_owner(message.owner)
    if not message.keys:
        raise UsageError("a pin of no chunks")
    p.count(message.keys, 32)
    if not (math.isfinite(message.ttl_s) and 0 < message.ttl_s <= MAX_TTL_S):
        raise UsageError(f"a pin for {message.ttl_s} s; more than 0, and {MAX_TTL_S:.0f} at most")
    if not (1 <= len(message.name) <= MAX_NAME_CHARS and message.name.isprintable()):
        raise UsageError(f"a pin's name has 1 to {MAX_NAME_CHARS} printable characters")


def checked_owner(owner: bytes) -> bytes:
    """Raises `UsageError` for one that is none."""
    if len(owner) != 16:
        raise UsageError(f"an owner of {len(owner)} bytes, not 16")
    return owner


def _place(id: Id) -> bytes:
    return id[0] + id[1].encode()


def _without(pin: Pin, gone: set[bytes]) -> Work[bytes]:
    """The keys of a pin but for some."""
    left = []
    for number, key in enumerate(p.split(pin.keys, 32), 1):
        if key not in gone:
            left.append(key)
        if number % 1024 == 0:
            yield None
    return b"".join(left)


async def _done(work: Awaitable[R] | R) -> R:
    return await work if isinstance(work, Awaitable) else work
