"""A node's events in the registry: what came into its own tiers and left them, in order.

Each node has one stream, which it alone writes. An entry's id is ``boot-number``: the numbers of
one boot follow each other without a gap, so a reader notices what it missed, and sees by another
boot that the process is another one, which began with nothing in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

from kvstrata.errors import Incompatible
from kvstrata.fleet.holdings import ID_BYTES
from kvstrata.fleet.registry import HELD_S, Registry
from kvstrata.wire.message import Message, Numbers

STORED, REMOVED, CLEARED, RESET = "stored", "removed", "cleared", "reset"
KEEP_ENTRIES = 10_000
"""Of each stream, about: at 20 a second those of eight minutes."""
READ_ENTRIES = 256
SLICE = 4000

_PUBLISH = """
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if top[1] then
  local boot, number = string.match(top[1][1], '^(%d+)-(%d+)$')
  local mine, next = string.match(ARGV[1], '^(%d+)-(%d+)$')
  boot, number, mine, next = tonumber(boot), tonumber(number), tonumber(mine), tonumber(next)
  if boot > mine or (boot == mine and number >= next) then return 0 end
end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], ARGV[1], 'b', ARGV[3])
local width, most = tonumber(ARGV[4]), tonumber(ARGV[5])
local function each(verb, key, ids)
  local members = {}
  for i = 1, #ids, width do
    members[#members + 1] = string.sub(ids, i, i + width - 1)
    if #members == most then
      redis.call(verb, key, unpack(members))
      members = {}
    end
  end
  if #members > 0 then redis.call(verb, key, unpack(members)) end
end
for i = 2, #KEYS do
  local at = 7 + 3 * (i - 2)
  if ARGV[at] == '1' then redis.call('UNLINK', KEYS[i]) end
  each('SADD', KEYS[i], ARGV[at + 1])
  each('SREM', KEYS[i], ARGV[at + 2])
  redis.call('EXPIRE', KEYS[i], ARGV[6])
end
return 1
"""


class Event(Message, frozen=True):
    """What happened to some objects of one tier.

    Args:
        what: `STORED`, `REMOVED`, `CLEARED`: all that was in the tier, or `RESET`: events are
            missing before this one, and what the node holds now is in the registry's sets.
        tier: which; empty for a reset.
        cause: of a removal, see `kvstrata.node.common.changes.Cause`.
        keys: 32 bytes each, of all objects.
        parts: of all of them; empty: all are 0.
    """

    what: str
    tier: str = ""
    cause: str = ""
    keys: bytes = b""
    parts: Numbers = msgspec.field(default_factory=list)


class Batch(Message, frozen=True):
    """An entry of the stream.

    Args:
        at: when it was sent, seconds since 1970 by the node's clock.
        events: in order.
    """

    at: float
    events: Annotated[list[Event], msgspec.Meta(max_length=1 << 16)]


class Entry(NamedTuple):
    """One that was read.

    Args:
        boot, number: of the entry.
        batch: its events.
        gap: whether entries before it were missed, or it is of another process than those.
    """

    boot: int
    number: int
    batch: Batch
    gap: bool


class Moves(NamedTuple):
    """What a batch means for the set of a tier; ids as in `kvstrata.fleet.holdings`."""

    emptied: bool
    added: set[bytes]
    removed: set[bytes]


_decoder = msgspec.msgpack.Decoder(Batch)


def publish(
    registry: Registry,
    name: str,
    boot: int,
    number: int,
    batch: Batch,
    moves: Mapping[str, Moves],
) -> None:
    """Append a batch to a node's stream and change its sets, both or none; again does nothing.

    Raises:
        TierUnavailable: the registry cannot be used; whether it was done is not known.
    """
    keys = [registry.names.events(name)]
    arguments: list[object] = [f"{boot}-{number}", KEEP_ENTRIES, msgspec.msgpack.encode(batch)]
    arguments += [ID_BYTES, SLICE, HELD_S]
    for tier, move in moves.items():
        keys.append(registry.names.held(name, boot, tier))
        arguments += [int(move.emptied), b"".join(move.added), b"".join(move.removed)]
    with registry.call():
        registry.script(_PUBLISH, keys, *arguments)


def refill(registry: Registry, name: str, boot: int, tier: str, ids: Sequence[bytes]) -> None:
    """Make the set of a tier hold these and nothing else; not at once.

    Raises:
        TierUnavailable: the registry cannot be used.
    """
    key = registry.names.held(name, boot, tier)
    with registry.call():
        registry.run("UNLINK", key)
    for start in range(0, len(ids), SLICE):
        with registry.call():
            registry.run("SADD", key, *ids[start : start + SLICE])
    with registry.call():
        registry.run("EXPIRE", key, HELD_S)


class Reader:
    """Reads a node's stream from where it begins, or from an entry on; any number may.

    Args:
        registry: of the fleet.
        name: of the node.
        after: the last entry that was read, boot and number; None: from the oldest on.
    """

    def __init__(self, registry: Registry, name: str, after: tuple[int, int] | None = None) -> None:
        self._registry = registry
        self._name = name
        self._after = after

    def read(self) -> list[Entry]:
        """The next entries that are there; does not wait for more.

        Raises:
            TierUnavailable: the registry cannot be used.
            Incompatible: an entry is none.
        """
        start = "-" if self._after is None else f"({self._after[0]}-{self._after[1]}"
        with self._registry.call():
            entries = self._registry.run(
                "XRANGE", self._registry.names.events(self._name), start, "+",
                "COUNT", READ_ENTRIES,
            )  # fmt: skip
        return list(self._taken(entries))

    def _taken(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[Entry]:
        for id, fields in entries:
            boot, number = map(int, id.split(b"-"))
            try:
                batch = _decoder.decode(fields[b"b"])
            except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise Incompatible(f"no batch of events: {error}") from error
            follows = self._after == (boot, number - 1)
            first = self._after is None and number == 1
            self._after = boot, number
            yield Entry(boot, number, batch, not (follows or first))
