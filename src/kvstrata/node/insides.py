"""What a prompt parts from inside it: found by its marks, leased and brought like a match's chunk.

A prompt goes on behind its last whole chunk that is stored, and what is stored goes on otherwise:
the same document with another question, a tail that has become longer. Whatever they have in common
is as good as a chunk, since the marks cover the tokens.

With several layer groups it has an object of each on each rank: one header's marks answer for all,
since they depend on tokens alone, but what is answered has all of them. Where it ends, no window
reaches back further than from the boundary before it, so the match has leased what else it needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kvstrata.errors import UsageError
from kvstrata.header import MARK_BYTES, MARK_TOKENS, MAX_CHUNK_TOKENS, ObjectHeader
from kvstrata.keys import OWNER_BYTES
from kvstrata.node.bounds import Bounds
from kvstrata.node.common.changes import Cause, Changes
from kvstrata.node.common.children import Child, Children
from kvstrata.node.common.index import Index
from kvstrata.node.common.spares import Name
from kvstrata.node.locating import Located, with_slots
from kvstrata.node.matching import Matcher
from kvstrata.node.searching import check_tiers, checked_parts
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.promotions import Load
from kvstrata.node.slots.boundaries import Stretch
from kvstrata.node.slots.clients import Client
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.leases import Lease, LeaseTable
from kvstrata.node.slots.sampling import Sampler
from kvstrata.node.slots.slot import Row, Slot, offsets_of_rows
from kvstrata.objects import HEADER_BYTES, marks_of, stored_bytes
from kvstrata.observe.counters import Counters
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p


class _Asked(NamedTuple):
    """What is asked, checked."""

    parts: tuple[int, ...]
    orders: frozenset[str]
    lengths: list[int]
    block_tokens: list[int]
    owner: bytes
    token_s: float
    among: frozenset[str]
    bounded: frozenset[int]

    @property
    def width(self) -> int:
        """Parts of a chunk, where not every one is needed of each; else 0, as of a `Lease`."""
        return len(self.parts) if self.bounded else 0

    def sizes_of(self, child: Child) -> dict[int, int]:
        """Bytes of each of its objects when it is raw: it has as few blocks as hold its tokens."""
        each = zip(self.parts, self.lengths, self.block_tokens, strict=True)
        return {
            part: stored_bytes(length * -(-child.num_tokens // tokens))
            for part, length, tokens in each
        }


class Insides:
    """Answers what begins like the rest of a prompt; watches what comes into host memory.

    Args:
        host: host memory.
        leases: of its rows.
        movement: promotes.
        matcher: knows where chunks are, and whether loading is weighed against computing.
        sampler: verifies some of what is found.
        backings: the slower tiers, fastest first.
        counters: the node's.
        changes: of its own tiers.
        ending: whether the node gives out nothing any more.
    """

    def __init__(
        self,
        host: HostMemory,
        leases: LeaseTable,
        movement: Movement,
        matcher: Matcher,
        sampler: Sampler,
        backings: Sequence[Backing],
        counters: Counters,
        changes: Changes,
        ending: Callable[[], bool],
    ) -> None:
        self._host = host
        self._leases = leases
        self._movement = movement
        self._matcher = matcher
        self._sampler = sampler
        self._backings = backings
        owned = [one for one in backings if isinstance(one, OwnedBacking)]
        self._owned = {one.name: one for one in owned}
        self._indexes: list[Index[Any]] = [host.index, *(one.index for one in owned)]
        self._counters = counters
        self._ending = ending
        self.children = Children()
        changes.watch(self)
        for backing in owned:
            backing.heard = self._heard

    def inside(self, client: Client, message: p.Inside) -> p.Nearest:
        """Lease the object that has most in common with the rest of a prompt, and bring it.

        Raises:
            UsageError: the request makes no sense.
        """
        check_tiers(message.tiers, self._backings)
        asked = _checked(message)
        lease = self._lease(client, message.lease, asked)
        have = 0 if lease is None else lease.num_chunks
        for child, located in self._candidates(message.marks, asked):
            if (
                client.ended
                or self._ending()
                or not self._pays(located, child.good_tokens * asked.token_s, lease)
            ):
                continue
            taken = self._take(client, child, located, asked, lease)
            if taken is not None:
                self._note_use(child, asked.bounded)
                lease, row = taken
                return p.Nearest(
                    message.id, lease.id, have, child.key, child.num_tokens, child.good_tokens,
                    located.tier, offsets_of_rows([row]),
                )  # fmt: skip
        return p.Nearest(message.id, 0, have)

    def _candidates(self, marks: bytes, asked: _Asked) -> Iterator[tuple[Child, Located]]:
        """What is somewhere, the most good tokens first; of equals what is in the fastest tier."""
        children = self.children.alike(marks)
        for _, equals in itertools.groupby(children, lambda child: child.good_tokens):
            slower: list[tuple[Child, Located]] = []
            for child in equals:
                located = self._locate(child, asked)
                if located is not None and located.tier:
                    slower.append((child, located))
                elif located is not None:  # there is none faster, so the others are not looked for
                    yield child, located
            yield from sorted(slower, key=lambda pair: pair[1].tier)

    def replace(self, key: bytes) -> None:
        """What was stored now begins with shorter tails: these need not be kept."""
        for tail in self._begun(self._host.index, key):
            if self._host.is_held(tail):  # by whoever writes it, perhaps
                for behind in self._movement.behind:
                    behind.forget({tail})
            if not self._host.is_held(tail):
                self._host.drop(tail, Cause.EVICTED)

    def lacks(self, key: bytes) -> bool:
        """Whether a chunk's header would be of use: it is not known, and there is room for it."""
        return key not in self.children and not self.children.is_full

    # of `kvstrata.node.common.changes.Watcher`

    def entered(self, tier: str, key: bytes, part: int) -> None:
        """See `Watcher`."""
        if tier == "host" and key not in self.children:
            slot = self._host.get(key, part)
            assert slot is not None
            page = self._host.pool.view(slot.offset, HEADER_BYTES)
            self.children.enter(key, *marks_of(page))
        elif tier in self._owned and key in self.children:
            self._replace_in(self._owned[tier], key)

    def found(self, tier: str, names: Sequence[Name]) -> None:
        """See `Watcher`."""
        for key in [key for key, _ in names if key in self.children]:
            self._replace_in(self._owned[tier], key)

    def left(self, tier: str, key: bytes, part: int, cause: Cause) -> None:
        """See `Watcher`."""
        if key in self.children and not any(key in index for index in self._indexes):
            self.children.leave(key)

    def emptied(self, tier: str) -> None:
        """See `Watcher`. What no tier has any more is found nowhere, and forgotten in its turn."""
        if not any(len(index) for index in self._indexes):
            self.children.clear()

    def _heard(self, key: bytes, header: ObjectHeader) -> None:
        """A header was read in a slower tier: by a load, by the scrub, or after a restart."""
        self.children.enter(key, header.num_tokens, header.chunk_tokens, header.marks)

    # how

    def _begun(self, index: Index[Any], key: bytes) -> list[bytes]:
        """Tails that an object begins with, and that may go from a tier for it.

        They may once it has all the parts that they have: half of it would be of no use.
        """
        if not (tails := self.children.tails_begun(key)):
            return []
        parts = {part for part, _ in index.objects(key)}
        return [
            tail
            for tail in tails
            if tail not in index.pinned and parts.issuperset(one for one, _ in index.objects(tail))
        ]

    def _replace_in(self, backing: OwnedBacking, key: bytes) -> None:
        """As `replace`, of a slower tier that it has come into."""
        for tail in self._begun(backing.index, key):
            parts = [part for part, _ in backing.index.objects(tail)]
            if not any((tail, part) in self._movement.arriving for part in parts):
                backing.evict(tail)

    def _lease(self, client: Client, number: int, asked: _Asked) -> Lease | None:
        """The lease that is to have it, too; None: one of its own."""
        if not number:
            return None
        lease = self._leases.get(number)
        if (
            lease is None
            or lease.client is not client
            or not lease.whole
            or lease.width != asked.width
        ):
            raise UsageError(
                f"lease {number} is none of this connection, or of another kind of match"
            )
        return lease

    def _locate(self, child: Child, asked: _Asked) -> Located | None:
        sizes = asked.sizes_of(child)
        return self._matcher.locate(child.key, asked.parts, asked.orders, sizes, asked.among)

    def _pays(self, located: Located, compute_s: float, lease: Lease | None) -> bool:
        """Whether it is brought sooner than its good tokens are computed, as far as one knows.

        A prompt whose chunks before it are still coming waits for what is queued anyway.
        """
        if not (compute_s and self._matcher.planning):
            return True
        coming: dict[Backing, int] = {}
        for one in located.wanted:
            coming[one.backing] = coming.get(one.backing, 0) + one.size
        links = [(self._movement.link(backing), size) for backing, size in coming.items()]
        if lease is not None and not lease.settled(lease.num_chunks - 1):
            links = [(link._replace(queued_bytes=0), size) for link, size in links]
        return all(link.seconds(size) <= compute_s for link, size in links)

    def _take(
        self, client: Client, child: Child, located: Located, asked: _Asked, lease: Lease | None
    ) -> tuple[Lease, Row] | None:
        """Lease it, and begin to bring what of it is in slower tiers; None: there is no room."""
        if located.new_bytes > self._leases.room_for(client):
            return None
        new: list[Slot] = []
        chunk_s = asked.token_s * child.num_tokens or math.inf
        load = Load(chunk_s, PORTABLE in asked.orders, asked.owner, tiers=asked.among)
        load.bounded = asked.bounded or None
        if located.wanted:
            with self._host.sparing({child.key}):
                given = self._movement.promote(load, [located.wanted])
            if not given:
                return None
            new = given[0]
        row = self._host.row(child.key, asked.parts, with_slots(located.places, new))
        if lease is None:
            lease = self._leases.grant(client, asked.orders)
            lease.whole = True
        elif lease.shape:
            have = lease.num_chunks
            before = [one for one in lease.shape if one.stop <= have]
            lease.shape = [*before, Stretch(have, have + 1, tuple(range(lease.width)))]
        self._leases.extend(lease, [row])
        self._movement.start(load, new, len(asked.parts))
        self._sampler.note_hits([child.key], asked.parts, [row])
        return lease, row

    def _note_use(self, child: Child, bounded: frozenset[int]) -> None:
        keys, nothing = [child.key], frozenset[int]()
        self.children.use(child.key)
        self._host.index.touch(keys)
        self._host.index.note_needs(keys, bounded, nothing)
        for backing in self._backings:
            backing.use(keys)
            backing.note_needs(keys, bounded, nothing)
        self._counters.add("inside_tokens_total", child.good_tokens)


def _checked(message: p.Inside) -> _Asked:
    """Raises `UsageError` or `Incompatible` for what makes no sense."""
    parts = tuple(checked_parts(message.parts))
    if not 0 < p.count(message.marks, MARK_BYTES) <= MAX_CHUNK_TOKENS // MARK_TOKENS:
        raise UsageError(f"{len(message.marks)} bytes of marks, not of up to a chunk's tokens")
    if len(message.lengths) != len(parts):
        raise UsageError(f"{len(parts)} parts, but the lengths of {len(message.lengths)}")
    if len(message.block_tokens) != len(parts):
        raise UsageError(f"{len(parts)} parts, but the blocks of {len(message.block_tokens)}")
    if not all(0 < tokens <= MAX_CHUNK_TOKENS for tokens in message.block_tokens):
        raise UsageError(f"{message.block_tokens} are no numbers of a block's tokens")
    if not all(0 < length < 1 << 36 for length in message.lengths):
        raise UsageError("a block has at least one byte, and less than 2^36")
    if len(message.owner) != OWNER_BYTES:
        raise UsageError(f"an owner of {len(message.owner)} bytes, not {OWNER_BYTES}")
    if not 0 <= message.token_s < math.inf:
        raise UsageError(f"{message.token_s} s is no time that a token takes")
    bounds = Bounds(parts, message.needs or [0] * len(parts))
    bounded = frozenset(parts).difference(bounds.full)
    return _Asked(
        parts, frozenset(message.orders), message.lengths, message.block_tokens, message.owner,
        message.token_s, frozenset(message.tiers), bounded,
    )  # fmt: skip
