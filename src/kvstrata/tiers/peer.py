"""The host memory of other nodes, as a tier that is only read.

A peer that fails is left alone for a while; the others serve on. Beside those that are configured a
request may name one, which is asked for that request.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout

from kvstrata import parts
from kvstrata.errors import TierUnavailable
from kvstrata.header import OBJECT_ID_BYTES
from kvstrata.tiers.base import Epoch, Limits, Outcome, Put, SharedTier, Stat
from kvstrata.tiers.one_peer import Connect, Peer
from kvstrata.transfer import peers as p
from kvstrata.transfer.borrowing import Borrower
from kvstrata.transfer.tcp import Address

TIMEOUT_S = 5.0
"""For an object to come, connecting included; less than a load may take (`deadlines.load`), so that
one peer that hangs does not switch off the others."""
STAT_S = 0.5
"""A peer that does not say within this time what it has is left alone, for others wait for it."""
LASTS_S = 5.0
MAX_PLACES = 1 << 16
MOST_ASKING = 64
"""Threads that ask, where it is not known yet how many peers there are."""
MAX_NAMED = 64
"""Peers that requests named last, whose connections are kept."""
NAMED_THREADS = 8


class PeerTier(SharedTier):
    """What other nodes have in host memory.

    Args:
        addresses: where those answer that are asked for everything.
        connect: makes a connection to one, within so many seconds.
    """

    name = "peer"

    def __init__(self, addresses: Sequence[Address], connect: Connect) -> None:
        self.limits = Limits(batch_objects=p.MAX_NAMES, timeout_s=TIMEOUT_S)
        self.peers = [Peer(address, connect) for address in addresses]
        self._borrower: Borrower | None = None
        # One for a peer that is tried again, the others end within `STAT_S`.
        self._asking = ThreadPoolExecutor(5 * len(self.peers) or MOST_ASKING, "kvstrata-peers")
        # Whom a client names may be anybody, and must not hold up those that are configured.
        self._asking_named = ThreadPoolExecutor(NAMED_THREADS, "kvstrata-named")
        self.find: Callable[[Sequence[tuple[bytes, int]]], set[Address]] | None = None
        """Says who is to have any of these objects, by key and part: nobody else is asked."""
        self._connect = connect
        self._named: OrderedDict[Address, Peer] = OrderedDict()
        self._tries: dict[Peer, Future[p.Reply]] = {}
        self._places: OrderedDict[bytes, Peer] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def read_by(self, borrower: Borrower) -> None:
        """Read by NIXL from now on, where the other end has it too."""
        self._borrower = borrower
        for peer in self.peers:
            peer.borrower = borrower

    def meet(self, addresses: Sequence[Address]) -> None:
        """These are asked from now on, and no others."""
        with self._lock:
            if self._closed:
                return
            known = {peer.address: peer for peer in self.peers}
            peers = [
                known.pop(one) if one in known else Peer(one, self._connect) for one in addresses
            ]
            for peer in peers:
                peer.borrower = self._borrower
            self.peers = peers
            gone = set(known.values())
            for name in [name for name, peer in self._places.items() if peer in gone]:
                del self._places[name]
        for peer in gone:
            peer.close()

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        """See `Store.stat`: all peers are asked at once, but for those that are left alone."""
        return self.stat_of(ids, None)

    def stat_of(
        self, ids: Sequence[bytes], named: Address | None, *, head_first: bool = True
    ) -> list[Stat | Outcome]:
        """The same, of all peers and of one that a request names.

        Args:
            ids: of the objects.
            named: that peer.
            head_first: whether who lacks the first of them has none that is of use.
        """
        also = self._meet(named) if named is not None else None
        asked = self.peers
        if self.find is not None and ids:
            some = ids[:1] if head_first else ids
            having = self.find([parts.named(one[-OBJECT_ID_BYTES:]) for one in some])
            asked = [peer for peer in asked if peer.address in having]
        answers = self._ask_all(p.Stat(list(ids)), also, asked)
        if also is None:
            self._check()
        found: list[Stat | Outcome] = [Outcome.MISS] * len(ids)
        with self._lock:
            for peer, reply in answers:
                if not isinstance(reply, p.Stats) or len(reply.sizes) != len(ids):
                    continue
                for number, nbytes in enumerate(reply.sizes):
                    if nbytes > 0 and found[number] is Outcome.MISS:
                        found[number] = Stat(nbytes)
                        self._places.pop(ids[number], None)
                        self._places[ids[number]] = peer
            while len(self._places) > MAX_PLACES:
                self._places.popitem(last=False)
        return found

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        deadline = time.monotonic() + TIMEOUT_S
        return [self._read(one, buffer, deadline) for one, buffer in zip(ids, into, strict=True)]

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        """Nothing: what is in a peer's memory is the peer's affair."""
        return [Outcome.FAILED] * len(puts)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        """Nothing, likewise."""
        return [Outcome.MISS] * len(ids)

    def tell(self, address: Address, request: p.Fetch | p.Watch) -> p.Fetching:
        """Ask one peer to fetch something, or how far it is.

        Raises:
            TierUnavailable: it does not answer, or answers something else.
        """
        with self._lock:
            peer = self._configured(address)
        peer = peer or self._meet(address)
        if peer is None:
            raise TierUnavailable("peer: the tier is closed")
        reply = peer.call(request, TIMEOUT_S)
        if not isinstance(reply, p.Fetching):
            raise TierUnavailable(f"{address}: it answers with a {type(reply).__name__}")
        return reply

    def epoch(self) -> Epoch:
        """Always the same one: peers' own clears are heard in each answer.

        Here those that failed are tried again, when they have been left alone for long enough; who
        answers is asked from then on.
        """
        tries = self._try_again()
        if not self._ask_all(p.Ping()):
            wait(tries, timeout=STAT_S)
        self._check()
        return Epoch(0, LASTS_S)

    def begin_epoch(self) -> Epoch:
        return self.epoch()

    def forget(self, epoch: int) -> int:
        return 0

    def close(self) -> None:
        with self._lock:
            self._closed = True
            peers = [*self.peers, *self._named.values()]
        for peer in peers:
            peer.close()
        for threads in (self._asking, self._asking_named):
            threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, one: bytes, into: memoryview, deadline: float) -> int | Outcome:
        if self._closed:
            raise TierUnavailable("peer: the tier is closed")
        with self._lock:
            peer = self._places.get(one)
        if peer is None:
            return Outcome.MISS
        try:
            if peer.failed:
                raise TierUnavailable(peer.trouble)
            nbytes = peer.read(one, into, deadline - time.monotonic())
        except TierUnavailable:
            if peer in self.peers:
                self._check()
            return Outcome.FAILED
        return nbytes if nbytes > 0 else (Outcome.FAILED if nbytes else Outcome.MISS)

    def _check(self) -> None:
        """Raises `TierUnavailable` if there is no peer that answers."""
        if self._closed:
            raise TierUnavailable("peer: the tier is closed")
        if self.peers and all(peer.failed for peer in self.peers):
            raise TierUnavailable("; ".join(peer.trouble for peer in self.peers))

    def fails(self, named: Address) -> bool:
        """Whether a peer that a request named has failed, and is left alone for now."""
        with self._lock:
            peer = self._named.get(named) or self._configured(named)
        return peer is not None and peer.failed and not peer.due

    def _configured(self, address: Address) -> Peer | None:
        return next((peer for peer in self.peers if peer.address == address), None)

    def _meet(self, named: Address) -> Peer | None:
        """The peer of this address, if it is asked for its name alone."""
        with self._lock:
            if self._closed or self._configured(named) is not None:
                return None
            peer = self._named.pop(named, None) or Peer(named, self._connect)
            peer.borrower = self._borrower
            self._named[named] = peer
            old = self._named.popitem(last=False)[1] if len(self._named) > MAX_NAMED else None
        if old is not None:
            old.close()
        return peer

    def _ask_all(
        self, request: p.Request, also: Peer | None = None, peers: Sequence[Peer] | None = None
    ) -> list[tuple[Peer, p.Reply]]:
        """The answers of those that are not left alone, in their order, and of one more."""
        asked = [
            (peer, self._submit(peer, request, STAT_S))
            for peer in (self.peers if peers is None else peers)
            if not peer.failed
        ]
        if also is not None and (also.due or not also.failed):
            asked.append((also, self._submit(also, request, STAT_S, self._asking_named)))
        answers = []
        for peer, future in asked:
            # One that is named may have to wait behind others that hang.
            with contextlib.suppress(TierUnavailable, FutureTimeout):
                answers.append((peer, future.result(STAT_S if peer is also else None)))
        return answers

    def _try_again(self) -> list[Future[p.Reply]]:
        """What asks those that failed whether they are back, where that is under way or due."""
        with self._lock:
            for peer in self.peers:
                if peer in self._tries and self._tries[peer].done():
                    del self._tries[peer]
                if peer.due and peer not in self._tries:
                    self._tries[peer] = self._submit(peer, p.Ping(), TIMEOUT_S)
            return list(self._tries.values())

    def _submit(
        self,
        peer: Peer,
        request: p.Request,
        timeout_s: float,
        threads: ThreadPoolExecutor | None = None,
    ) -> Future[p.Reply]:
        try:
            return (threads or self._asking).submit(peer.call, request, timeout_s)
        except RuntimeError as error:
            raise TierUnavailable("peer: the tier is closed") from error
