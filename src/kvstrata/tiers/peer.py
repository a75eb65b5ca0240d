"""The host memory of other nodes, as a tier that is only read.

Several connections to each peer, each of one call at a time. A peer that fails is left alone for a
while; the others serve on.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvstrata.errors import Incompatible, TierUnavailable
from kvstrata.tiers.base import Epoch, Limits, Outcome, Put, SharedTier, Stat
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import Address, Channel, ask, unavailable

TIMEOUT_S = 10.0
STAT_S = 0.5
"""A peer that does not say within this time what it has is left alone, for others wait for it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LASTS_S = 5.0
MAX_PLACES = 1 << 16

Connect = Callable[[Address], Channel]


class Peer:
    """One other node, and the connections to it; thread-safe.

    Args:
        address: where it answers.
        connect: makes a connection.
    """

    def __init__(self, address: Address, connect: Connect) -> None:
        self.address = address
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._again_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._closed = False

    @property
    def rests(self) -> bool:
        """Whether it is left alone for now."""
        return time.monotonic() < self._again_at

    def call(self, request: p.Request, into: memoryview | None = None) -> p.Reply:
        """Ask it, and take in the bytes that its answer announces.

        Raises:
            TierUnavailable: it failed, and is left alone for a while.
        """
        channel = self._take()
        try:
            if channel is None:
                channel = self._connect(self.address)
            reply = ask(channel, request, str(self.address))
            if isinstance(reply, p.Data) and reply.nbytes > 0:
                if into is None or reply.nbytes > len(into):
                    raise Incompatible(f"{reply.nbytes} bytes that nobody asked for")
                channel.receive_into(into[: reply.nbytes])
        except (OSError, Incompatible, TierUnavailable) as error:
            if channel is not None:
                channel.close()
            self._failed()
            raise unavailable(str(self.address), error) from error
        self._give(channel)
        return reply

    def close(self) -> None:
        """Hang up. Repeatable."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _take(self) -> Channel | None:
        with self._lock:
            if self._closed:
                raise TierUnavailable("peer: the tier is closed")
            return self._idle.pop() if self._idle else None

    def _give(self, channel: Channel) -> None:
        with self._lock:
            self._pause_s = FIRST_PAUSE_S
            self._again_at = 0.0
            if not self._closed:
                self._idle.append(channel)
                return
        channel.close()

    def _failed(self) -> None:
        """Its other connections are as good as dead, too."""
        with self._lock:
            idle, self._idle = self._idle, []
            if time.monotonic() >= self._again_at:
                self._again_at = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        for channel in idle:
            channel.close()


class PeerTier(SharedTier):
    """What other nodes have in host memory.

    Args:
        addresses: where they answer.
        connect: makes a connection to one.
    """

    name = "peer"

    def __init__(self, addresses: Sequence[Address], connect: Connect) -> None:
        self.limits = Limits(batch_objects=p.MAX_NAMES, timeout_s=TIMEOUT_S)
        self.peers = [Peer(address, connect) for address in addresses]
        self._asking = ThreadPoolExecutor(2 * len(self.peers), "kvstrata-peers")
        self._places: OrderedDict[bytes, Peer] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        """See `Store.stat`: all peers are asked at once; who answers in time is heard."""
        answers = self._ask_all(p.Stat(list(ids)))
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
        return [self._read(one, buffer) for one, buffer in zip(ids, into, strict=True)]

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        """Nothing: what is in a peer's memory is the peer's affair."""
        return [Outcome.FAILED] * len(puts)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        """Nothing, likewise."""
        return [Outcome.MISS] * len(ids)

    def epoch(self) -> Epoch:
        """Always the same one: peers' own clears are heard in each answer."""
        self._ask_all(p.Ping())
        return Epoch(0, LASTS_S)

    def begin_epoch(self) -> Epoch:
        return self.epoch()

    def forget(self, epoch: int) -> int:
        return 0

    def close(self) -> None:
        self._closed = True
        for peer in self.peers:
            peer.close()
        self._asking.shutdown(wait=False, cancel_futures=True)

    def _read(self, one: bytes, into: memoryview) -> int | Outcome:
        with self._lock:
            peer = self._places.get(one)
        if self._closed:
            raise TierUnavailable("peer: the tier is closed")
        if peer is None:
            return Outcome.MISS
        try:
            reply = peer.call(p.Read(one, len(into)), into)
        except TierUnavailable:
            if all(peer.rests for peer in self.peers):
                raise
            return Outcome.FAILED
        nbytes = reply.nbytes if isinstance(reply, p.Data) else -1
        return nbytes if nbytes > 0 else (Outcome.FAILED if nbytes else Outcome.MISS)

    def _ask_all(self, request: p.Request) -> list[tuple[Peer, p.Reply]]:
        """The answers of those that have one in time.

        Raises:
            TierUnavailable: nobody answers.
        """
        if self._closed:
            raise TierUnavailable("peer: the tier is closed")
        awake = [peer for peer in self.peers if not peer.rests]
        asked: dict[Future[p.Reply], Peer] = {}
        for peer in awake:
            asked[self._asking.submit(peer.call, request)] = peer
        done, _ = wait(asked, timeout=STAT_S)
        answers, trouble = [], TierUnavailable("every peer has failed lately")
        for future in done:
            try:
                answers.append((asked[future], future.result()))
            except TierUnavailable as error:
                trouble = error
        if not answers:
            raise trouble if done or not awake else TierUnavailable(f"no answer within {STAT_S} s")
        order = {id(peer): number for number, peer in enumerate(self.peers)}
        return sorted(answers, key=lambda answer: order[id(answer[0])])
