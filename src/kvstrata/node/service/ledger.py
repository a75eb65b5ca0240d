"""What an operator has said about a tier, kept beside its objects: marks, quotas and pins.

The state is in memory and holds at once. `save` writes down what is new; if that fails, all of it
is written the next time. A line is added for each change, and the journal is made anew when it is
mostly of what has passed, and long before it is too large to be read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from kvstrata.errors import TierUnavailable, UsageError
from kvstrata.tiers.journal import Journal
from kvstrata.tiers.marks import Mark, Marks

SPARE_LINES = 256
"""Lines that a journal may have before it is made anew, beside twice as many as are needed."""
SPARE_BYTES = 16 << 20
"""That a journal may have before it is made anew: twice what all that may hold at once needs."""
MAX_RECORD_BYTES = 4 << 20
"""Of one line. A pin of as many chunks as its owner may have needs less than half of it."""
MAX_QUOTAS = 1024


class Marked(msgspec.Struct, tag="mark", frozen=True):
    """See `Mark`."""

    owner: bytes
    namespace: bytes
    before_ns: int


class Quota(msgspec.Struct, tag="quota", frozen=True):
    """What an owner may have in the tier, in bytes; None: as much as there is room for."""

    owner: bytes
    nbytes: int | None


class Pin(msgspec.Struct, tag="pin", frozen=True):
    """Chunks that are to stay, until a time (Unix seconds)."""

    owner: bytes
    name: str
    keys: bytes
    until_s: float

    @property
    def id(self) -> tuple[bytes, str]:
        """What tells it from all others."""
        return self.owner, self.name


class Unpin(msgspec.Struct, tag="unpin", frozen=True):
    """The end of a pin."""

    owner: bytes
    name: str


Record = Marked | Quota | Pin | Unpin

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class Ledger:
    """The words of an operator about one tier.

    Args:
        journal: where they outlive the process; read now, which blocks.
    """

    def __init__(self, journal: Journal) -> None:
        self.marks = Marks()
        self.quotas: dict[bytes, int] = {}
        self.pins: dict[tuple[bytes, str], Pin] = {}
        self.damaged = journal.damaged
        """Whether something of it was lost: what was cleared, nobody knows."""
        self._journal = journal
        self._new: list[Record] = []
        self._new_bytes = 0
        self._num_lines = 0
        self._anew = self._forgot = False
        for line in journal.lines():
            self._num_lines += 1
            try:
                self._apply(_decoder.decode(line))
            except msgspec.MsgspecError:
                self.damaged = True

    @property
    def saved(self) -> bool:
        """Whether all of it outlives the process."""
        return not (self._new or self._anew)

    def note(self, record: Record) -> None:
        """Let something hold from now on; `save` writes it down.

        Raises:
            UsageError: it is too large for a journal; nothing has changed.
        """
        nbytes = _most_bytes(record)
        if nbytes > MAX_RECORD_BYTES:
            what = type(record).__name__.lower()
            raise UsageError(f"a {what} of {nbytes} bytes; {MAX_RECORD_BYTES} at most")
        self._apply(record)
        self._new.append(record)
        self._new_bytes += nbytes
        if self._journal.nbytes + self._new_bytes > SPARE_BYTES:
            self._new, self._new_bytes = [], 0
            self._anew = self._forgot = True

    def forget_marks(self, marks: Iterable[Mark]) -> None:
        """Drop marks of which nothing can be there any more."""
        before = len(self.marks)
        self.marks.forget(marks)
        if len(self.marks) < before:
            self._anew = self._forgot = True

    def saving(self) -> Callable[[], None]:
        """What writes down all that is new; blocks, and raises `TierUnavailable`.

        It may run in another thread; one at a time.
        """
        num_live = len(self.marks) + len(self.quotas) + len(self.pins)
        anew = self._anew or self._num_lines + len(self._new) > 2 * num_live + SPARE_LINES
        records = list(self._all()) if anew else self._new
        self._new, self._new_bytes = [], 0
        self._anew = True  # until it is known to have been written
        self._forgot = False
        self._num_lines = len(records) + (0 if anew else self._num_lines)

        def write() -> None:
            lines = [msgspec.json.encode(record) for record in records]
            if anew:
                self._journal.replace(lines)
            elif lines:
                self._journal.append(lines)

        return write

    def was_saved(self) -> None:
        """What `saving` gave has done its work."""
        self._anew = self._forgot

    def _all(self) -> Iterable[Record]:
        yield from (Marked(*mark) for mark in self.marks)
        yield from (Quota(owner, nbytes) for owner, nbytes in self.quotas.items())
        yield from self.pins.values()

    def _apply(self, record: Record) -> None:
        match record:
            case Marked():
                self.marks.add(Mark(record.owner, record.namespace, record.before_ns))
            case Quota(owner, None):
                self.quotas.pop(owner, None)
            case Quota(owner, nbytes) if nbytes is not None:
                self.quotas[owner] = nbytes
            case Pin():
                self.pins[record.id] = record
            case Unpin():
                self.pins.pop((record.owner, record.name), None)


def _most_bytes(record: Record) -> int:
    """An upper bound on what a record is as a line: its keys in base64, its name escaped."""
    return 256 + (
        len(record.keys) * 4 // 3 + 4 * len(record.name) if isinstance(record, Pin) else 0
    )


class Keeping:
    """Writes a ledger down, one time after the other.

    Args:
        ledger: that is written.
        tier: whose it is.
    """

    def __init__(self, ledger: Ledger, tier: str) -> None:
        self.ledger = ledger
        self._tier = tier
        self._busy = asyncio.Lock()

    async def save(self, call: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Write down what is new.

        Args:
            call: does blocking work elsewhere.
        Raises:
            TierUnavailable: it holds, and does not outlive the process.
        """
        async with self._busy:
            if self.ledger.saved:
                return
            try:
                await call(self.ledger.saving())
            except TierUnavailable as error:
                raise TierUnavailable(
                    f"{self._tier}: it holds now, but not after a restart: {error}"
                ) from error
            self.ledger.was_saved()


async def together(saves: Iterable[Awaitable[None]]) -> None:
    """Wait until all of these have ended; raises the first failure."""
    for outcome in await asyncio.gather(*saves, return_exceptions=True):
        if outcome is not None:
            raise outcome
