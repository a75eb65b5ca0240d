"""The client of a node: the same for a node in this process, on demand, or in service.

The control plane is the socket; the data plane is `NodeClient.pool`, the node's memory mapped here.
Every wait has a deadline, and sending never waits. What is answered after its deadline is given
back by itself: a late lease is released, a late reservation ended unwritten.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from kvstrata import errors
from kvstrata.errors import DeadlineExceeded, Incompatible, KVStrataError, NodeUnavailable
from kvstrata.header import NOBODY
from kvstrata.memory.pool import PoolMapping
from kvstrata.wire import protocol as p
from kvstrata.wire.connection import Connection

# Of a long clear or lookup: fewer than a request may name, and each is back soon.
PIECE_KEYS = 4096
TEND_S = 0.05


class Call:
    """A request under way. Wait for it once, from any thread."""

    __slots__ = ("_client", "_reply_type", "abandoned", "id", "reply")

    def __init__(self, client: NodeClient, id: int, reply_type: type) -> None:
        self._client = client
        self._reply_type = reply_type
        self.id = id
        self.reply: p.Reply | None = None
        self.abandoned = False

    def ready(self) -> bool:
        """Whether the answer is here; takes in what has arrived, and does not block.

        Raises:
            NodeUnavailable: the node has gone, and there will be no answer.
        """
        if self.reply is None:
            self._client.pump(self, 0.0)
        return self.reply is not None

    def wait(self, timeout_s: float) -> Any:
        """The answer.

        Raises:
            DeadlineExceeded: it has not come in time; the call is abandoned.
            NodeUnavailable: the node has gone.
            KVStrataError: what the node answered instead.
        """
        try:
            self._client.pump(self, timeout_s)
        except NodeUnavailable:
            if self.reply is None:
                raise
        if self.reply is None:
            self.abandon()
            raise DeadlineExceeded(f"the node has not answered within {timeout_s * 1e3:.0f} ms")
        if isinstance(self.reply, p.Failed):
            kind = getattr(errors, self.reply.kind, None)
            if not (isinstance(kind, type) and issubclass(kind, KVStrataError)):
                kind = KVStrataError
            if kind is errors.ConfigError:
                kind = KVStrataError
            raise kind(self.reply.message)
        if not isinstance(self.reply, self._reply_type):
            raise Incompatible(f"the node answered with {type(self.reply).__name__}")
        return self.reply

    def abandon(self) -> None:
        """Wait no longer; what is granted late is given back."""
        self._client.abandon(self)


class NodeClient:
    """A connection to a node. Thread-safe.

    Args:
        connected: a connected Unix socket whose other end is a node; owned from now on.
        timeout_s: for the node's first word, and for `lookup` and `status`.

    Raises:
        NodeUnavailable: nobody answered, or the other end hung up.
        Incompatible: the node speaks another version.
    """

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        self._connection = Connection(connected)
        self._timeout_s = timeout_s
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._state = threading.Condition()
        self._receiving = False
        self._tending = False
        try:
            self.hello, fd = self._connection.greet(timeout_s)
            try:
                #: the node's memory, mapped into this process
                self.pool = PoolMapping.attach(fd, self.hello.capacity_bytes)
            finally:
                os.close(fd)
        except BaseException:
            self._connection.lose("the node did not introduce itself")
            raise

    @property
    def alive(self) -> bool:
        """Whether the connection still stands, as far as is known without asking."""
        return self._connection.lost is None

    def begin(self, message_type: type, reply_type: type, *fields: Any) -> Call:
        """Send a request and do not wait.

        Args:
            message_type: a request of `kvstrata.wire.protocol` whose first field is ``id``.
            reply_type: what must answer it.
            fields: the request's other fields, in order.

        Raises:
            NodeUnavailable: the node has gone.
            UsageError: it is longer than a request may be.
        """
        call = Call(self, next(self._numbers), reply_type)
        with self._state:
            self._calls[call.id] = call
        try:
            self.send(message_type(call.id, *fields))
        except KVStrataError:
            with self._state:
                self._calls.pop(call.id, None)
            raise
        return call

    def match(
        self,
        keys: Sequence[bytes],
        parts: list[int],
        orders: list[str],
        lengths: Sequence[int] = (),
        owner: bytes = NOBODY,
        namespace: bytes = b"",
        chunk_s: float = 0.0,
        pair_s: float = 0.0,
        peer: str = "",
        expected_s: float = 0.0,
        tail: Sequence[int] = (),
        heads: bytes = b"",
        traceparent: str = "",
        tiers: Sequence[str] = (),
        needs: Sequence[int] = (),
        meet: bool = False,
    ) -> Call:
        """Begin a match; `Call.wait` answers `kvstrata.wire.protocol.Matched`.

        Args:
            keys: of the prompt's chunks, head first; asks for no more of them than a match may.
            parts: what makes up a chunk.
            orders: the byte orders that the caller can read.
            lengths: payload bytes of each part; without them nothing arrives that a tier keeps
                encoded, for nobody knows how large it will be.
            owner: `kvstrata.keys.owner_digest` of who asks.
            namespace: what the KV belongs to, 32 bytes; without it no shared tier is asked.
            chunk_s: seconds that computing a chunk takes; 0: unknown.
            pair_s: seconds that it takes besides for each chunk before it.
            peer: another node's address, which is asked too where the operator allows it.
            expected_s: how long to wait for each chunk more that the peer is about to have, in
                seconds; 0: what it does not have is not waited for.
            tail: of a last key that is a tail's, payload bytes of each part.
            heads: `kvstrata.heads.heads` of the prompt, so that a miss can be explained better.
            traceparent: of the span that waits for it, where the request is traced.
            tiers: names of those that may be loaded from, besides host memory; none: all.
            needs: of each part, how many of the last chunks a boundary needs, 0: all; the longest
                one is answered that has what it needs. Empty: all chunks of each part.
            meet: whether the caller can compute chunks from the front while they arrive from the
                end, where that is sooner; not with ``needs`` or ``expected_s``.
        """
        some = keys[: _most_keys(parts)]
        packed, tail = b"".join(some), tail if len(some) == len(keys) else ()
        fields = (packed, parts, orders, list(lengths), owner, namespace, chunk_s, pair_s, peer,
                  expected_s, list(tail), heads, traceparent, list(tiers), list(needs),
                  meet)  # fmt: skip
        return self.begin(p.Match, p.Matched, *fields)

    def await_arrival(self, lease: int, have: int) -> Call:
        """Begin to wait for more than ``have`` chunks of a lease; answers `Arrived`."""
        return self.begin(p.Await, p.Arrived, lease, have)

    def await_arrival_before(self, lease: int, first: int) -> Call:
        """Begin to wait for the chunks right before number ``first``; answers `Arrived`."""
        return self.begin(p.Await, p.Arrived, lease, first, True)

    def release(self, lease: int, keep: int = 0) -> None:
        """End a lease but for its first ``keep`` chunks; nothing happens if the node is gone."""
        if lease:
            with contextlib.suppress(NodeUnavailable):
                self.send(p.Release(lease, keep))

    def reserve(
        self,
        namespace: bytes,
        prefix: Sequence[bytes],
        first: int,
        part: int,
        template: p.Template,
        cost: float = 0.0,
        weights: str = "",
        owner: bytes = NOBODY,
        lend: bool = False,
        traceparent: str = "",
        priority: int = 0,
        tiers: Sequence[str] = (),
        marks: bytes = b"",
    ) -> Call:
        """Begin to reserve slots for ``prefix[first:]``; answers `Reserved`.

        Args:
            namespace: what the KV belongs to, 32 bytes.
            prefix: keys of the prompt's chunks from the first to the last one to write.
            first: number of the first chunk to write.
            part: which object of each chunk, ``group << 16 | rank``.
            template: what all headers share.
            cost: what computing a chunk took, in seconds; 0: unknown.
            weights: `kvstrata.identity.weights_identity` of what computed it; "": unknown.
            owner: `kvstrata.keys.owner_digest` of who it was computed for.
            lend: whether it is kept for another node until that has it.
            traceparent: as of `match`.
            priority: what it matters more or less than others, -1 to 3.
            tiers: names of those it may be written behind to; none: all.
            marks: of the chunks to write, see `kvstrata.keys.KeyChain.marks`; none: they are found
                whole or not at all.
        """
        fields = (namespace, b"".join(prefix), first, part, template, cost, weights, owner, lend,
                  traceparent, priority, list(tiers), marks)  # fmt: skip
        return self.begin(p.Reserve, p.Reserved, *fields)

    def commit(self, reservation: int, checksums: Sequence[bytes]) -> Call:
        """Begin to publish what was written; answers `Done`. 16 zero bytes give a slot back."""
        return self.begin(p.Commit, p.Done, reservation, b"".join(checksums))

    def lookup(
        self,
        keys: Sequence[bytes],
        parts: list[int],
        orders: Sequence[str] = (),
        namespace: bytes = b"",
        timeout_s: float | None = None,
    ) -> bytes:
        """The tier of each chunk, one byte each, 255 where absent.

        Args:
            keys: of the chunks; the leading ones of a prompt, as far as shared tiers are asked.
            parts: what makes up a chunk.
            orders: in one of which an object has to be; empty: any will do.
            namespace: as of `match`; with it and ``orders`` the shared tiers are asked too.
            timeout_s: for each request that this takes; the client's own if None.
        """
        tiers, patience_s = b"", self._timeout_s if timeout_s is None else timeout_s
        for some in _pieces(keys, parts):
            call = self.begin(p.Lookup, p.Found, b"".join(some), parts, list(orders), namespace)
            found: p.Found = call.wait(patience_s)
            tiers += found.tiers
        return tiers

    def clear(
        self,
        keys: Sequence[bytes] | None = None,
        tiers: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> int:
        """Forget these chunks, or all; returns the number of objects that went.

        Many are cleared by several requests, one after the other: if one fails, those before it
        have been done.
        """
        if keys is None:
            return self._clear(None, tiers, timeout_s)
        deadline = time.monotonic() + timeout_s
        return sum(
            self._clear(some, tiers, max(0.0, deadline - time.monotonic()))
            for some in _pieces(keys)
        )

    def _clear(self, keys: Sequence[bytes] | None, tiers: Sequence[str], timeout_s: float) -> int:
        packed = None if keys is None else b"".join(keys)
        done: p.Done = self.begin(p.Clear, p.Done, packed, list(tiers)).wait(timeout_s)
        return done.count

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything committed so far is written behind."""
        self.begin(p.Flush, p.Done).wait(timeout_s)

    def status(self) -> dict[str, Any]:
        """The node's state, as ``kvstrata status --json`` prints it."""
        state: p.State = self.begin(p.Status, p.State).wait(self._timeout_s)
        return state.state

    def metrics(self) -> p.Measured:
        """The node's metrics as numbers; `kvstrata.observe.rendering.render` makes text of them."""
        measured: p.Measured = self.begin(p.Metrics, p.Measured).wait(self._timeout_s)
        return measured

    def record(self, record: dict[str, Any]) -> None:
        """Hand in one request's record; nothing happens if the node is gone."""
        with contextlib.suppress(NodeUnavailable):
            self.send(p.Record(record))

    def close(self) -> None:
        """Say that no copy is under way, and hang up. Repeatable; never raises."""
        self._connection.hang_up()
        self.pool.close()

    def send(self, message: p.Request) -> None:
        """Send one message, or queue it for a node that is slow to take it; does not wait.

        Raises:
            NodeUnavailable: the node has gone, or has taken nothing for too many messages.
        """
        self._connection.send(message)
        if self._connection.num_unsent:
            self._tend_later()

    def pump(self, call: Call, timeout_s: float) -> None:
        """Receive until this call is answered or the time is over. One thread receives for all."""
        deadline = time.monotonic() + timeout_s
        with self._state:
            while call.reply is None:
                if self._connection.lost is not None:
                    raise NodeUnavailable(self._connection.lost)
                left = deadline - time.monotonic()
                if left < 0 and timeout_s > 0:
                    return
                if self._receiving:
                    if timeout_s <= 0 or not self._state.wait(left):
                        return
                    continue
                self._receiving = True
                self._state.release()
                try:
                    replies = self._connection.receive(max(0.0, left))
                finally:
                    self._state.acquire()
                    self._receiving = False
                    self._state.notify_all()
                if replies is None:
                    return
                for reply in replies:
                    self._settle(reply)

    def look(self) -> None:
        """Take in what has come, and so find out whether the node has gone; does not block."""
        with contextlib.suppress(NodeUnavailable):
            self.pump(Call(self, 0, p.Done), 0.0)

    def abandon(self, call: Call) -> None:
        """Wait no longer for a call; what it grants goes back."""
        with self._state:
            call.abandoned = True
            if call.reply is not None:
                self._give_back(call.reply)
            else:
                self._tend_later()

    def _tend_later(self) -> None:
        """See to it that late answers are taken in, and messages sent, if nobody asks again."""
        with self._state:
            if not self._tending and self.alive:
                self._tending = True
                threading.Thread(target=self._tend, name="kvstrata-late", daemon=True).start()

    def _tend(self) -> None:
        while True:
            with self._state:
                late = next((call for call in self._calls.values() if call.abandoned), None)
                if not self.alive or (late is None and not self._connection.num_unsent):
                    self._tending = False
                    return
            # In slices: what is queued meanwhile must not wait for an answer to something else.
            if late is None:
                time.sleep(TEND_S)
                self._connection.flush()
            else:
                with contextlib.suppress(NodeUnavailable):
                    self.pump(late, TEND_S)

    def _settle(self, reply: p.Reply) -> None:
        call = self._calls.pop(getattr(reply, "id", 0), None)
        if call is not None:
            call.reply = reply
            if call.abandoned:
                self._give_back(reply)

    def _give_back(self, reply: p.Reply) -> None:
        if isinstance(reply, p.Matched):
            self.release(reply.lease)
        elif isinstance(reply, p.Nearest):
            self.release(reply.lease, reply.have)
        elif isinstance(reply, p.Reserved):
            with contextlib.suppress(NodeUnavailable):
                self.send(p.Commit(0, reply.reservation, bytes(2 * len(reply.offsets))))


def offsets_of(packed: bytes) -> array[int]:
    """Offsets as the node packs them: signed 64-bit numbers."""
    offsets: array[int] = array("q")
    offsets.frombytes(packed)
    return offsets


def _pieces(keys: Sequence[bytes], parts: Sequence[int] = (0,)) -> Iterator[Sequence[bytes]]:
    """The keys of one request after the other; at least one piece."""
    most = min(PIECE_KEYS, _most_keys(parts))
    for start in range(0, max(1, len(keys)), most):
        yield keys[start : start + most]


def _most_keys(parts: Sequence[int]) -> int:
    return min(p.MAX_KEYS, p.MAX_OBJECTS // max(1, len(parts)))
