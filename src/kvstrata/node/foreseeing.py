"""What a peer that a request names does not have yet, but is about to have.

Slots are made for it and leased as for anything that is on its way, and filled as the peer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstrata.node.locating import Located
from kvstrata.node.searching import Search
from kvstrata.node.service.backing import Backing, Question
from kvstrata.node.service.expecting import Expecting, Foreseen
from kvstrata.node.service.movement import Movement
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.service.promotions import Wanted
from kvstrata.node.slots.host import HostMemory
from kvstrata.node.slots.slot import Slot

Locate = Callable[..., Located | None]
"""As `Matcher.locate`."""


class Foresight:
    """What matches may count on from the peers that they name.

    Args:
        host: host memory.
        movement: makes the slots.
        expecting: follows what peers are about to have.
        backings: the slower tiers, fastest first.
        locate: says where the parts of a chunk are.
    """

    def __init__(
        self,
        host: HostMemory,
        movement: Movement,
        expecting: Expecting,
        backings: Sequence[Backing],
        locate: Locate,
    ) -> None:
        self._host = host
        self._movement = movement
        self._expecting = expecting
        self._locate = locate
        self._peers = next((one for one in backings if isinstance(one, PeerBacking)), None)
        self._number = 1 + (backings.index(self._peers) if self._peers is not None else 0)

    def name(self, search: Search, peer: str) -> None:
        """Let a search ask the peer that its request names, or note why not."""
        if self._peers is None:
            search.peer_refused = "the node asks no peer that a request names: see peer.named"
        else:
            search.peer, search.peer_refused = self._peers.named(peer)

    def locate(self, search: Search, key: bytes) -> Located | None:
        """Where a chunk's parts are or will be, once the peer has them; None: nobody can tell."""
        assert self._peers is not None
        sizes = search.sizes_of(key)
        places: list[Slot | Wanted] = []
        for part in search.parts:
            one = self._locate(key, (part,), search.orders, sizes, search.among)
            if one is not None:
                places += one.places
                continue
            slot = self._movement.arriving.get((key, part))
            if self._host.get(key, part) is not None or (slot is None and part not in sizes):
                return None
            places.append(slot or Wanted(key, part, sizes[part], self._peers, 0))
        return Located(key, places, self._number, self._host.rows_of(search.parts).get(key))

    def follow(
        self, search: Search, slots: Sequence[Slot], needs: tuple[int, ...] = ()
    ) -> list[Slot]:
        """Have the slots filled of what the peer is about to have; those of what somebody has.

        Args:
            search: that foresees; its parts are all that make up a chunk.
            slots: made to bring something into, in the order of the chunks.
            needs: as of `Question`.
        """
        here: list[Slot] = []
        objects: list[Foreseen] = []
        for slot in slots:
            wanted = self._movement.prepared(slot)
            if wanted is not None and not wanted.stored:
                objects.append(Foreseen(wanted.key, wanted.part, slot))
            else:
                here.append(slot)
        if objects and search.load is not None and self._peers is not None:
            question = Question(
                search.namespace, [], search.parts, search.preferred, search.peer, needs
            )
            self._expecting.follow(self._peers, question, search.load, objects, search.expected_s)
        return here
