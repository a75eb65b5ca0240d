"""A node's door for other nodes: a TCP socket, a thread for each connection.

A thread sends what is asked for from its slot, and says then whether that lay still meanwhile.
Nobody gets further than a hello without a secret of the deployment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from typing import TypeVar

from kvstrata.config import Config
from kvstrata.errors import Incompatible, KVStrataError, TierUnavailable
from kvstrata.node.common.background import report_bug
from kvstrata.node.lending import Lender
from kvstrata.node.node import Node
from kvstrata.node.process.loans import Loans
from kvstrata.node.slots.slot import Slot, SlotState
from kvstrata.observe.counters import Counters
from kvstrata.secret import Secrets
from kvstrata.transfer import nixl
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import Address, Channel

logger = logging.getLogger(__name__)

R = TypeVar("R")

Fetcher = Callable[[p.Fetch | p.Watch], p.Fetching]

MAX_CONNECTIONS = 256
MAX_WHY_CHARS = 1000
HELLO_S = 5.0
ACCEPT_AGAIN_S = 0.1
TIMEOUT_S = 10.0
IDLE_S = 3600.0
EVERYWHERE = ("0.0.0.0", "::")
"""Where one can listen, and nobody can be found."""
TELL_S = 0.02
"""For how long the loop may not know yet what has been sent."""
SLICE = 256
"""Names that are looked up without a turn for others."""


class PeerServer:
    """Answers other nodes; made on the node's loop.

    Args:
        address: where to listen; port 0: any free one.
        known: the deployment's secrets.
        lender: finds what they ask for.
        counters: the node's.
        tls: for a network that is not trusted.
        by_nixl: lends host memory by NIXL.
        fetch: has something fetched from another node; None: nothing is.
    Raises:
        TierUnavailable: one cannot listen there.
    """

    def __init__(
        self,
        address: Address,
        known: Secrets,
        lender: Lender,
        counters: Counters,
        tls: ssl.SSLContext | None = None,
        by_nixl: nixl.Lender | None = None,
        fetch: Fetcher | None = None,
    ) -> None:
        self._known = known
        self._lender = lender
        self._counters = counters
        self._tls = tls
        self._by_nixl = by_nixl
        self._fetch = fetch
        self._loop = asyncio.get_running_loop()
        self._connections: set[socket.socket] = set()
        self._sent: deque[Slot] = deque()
        self._telling = False
        self._lock = threading.Lock()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._listener = socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            raise TierUnavailable(f"cannot listen on {address}: {error}") from error
        host, port = self._listener.getsockname()[:2]
        self.address = Address(host, port)
        threading.Thread(target=self._accept, name="kvstrata-peers", daemon=True).start()

    @classmethod
    def of(cls, config: Config, known: Secrets, node: Node) -> PeerServer | None:
        """As configured; None where the node answers no others, or cannot.

        Raises:
            ConfigError: TLS cannot be had.
        """
        network = config.network
        if network.listen is None:
            return None
        try:
            server = cls(
                network.listen,
                known,
                node.lender,
                node.counters,
                network.tls(serving=True),
                None if node.nixl is None else node.nixl.lender,
                node.operations.fetch,
            )
        except TierUnavailable as error:
            logger.error("other nodes get nothing from this one: %s", error)
            node.left_out["network"] = str(error)
            return None
        if network.advertise is not None or network.listen.host not in EVERYWHERE:
            node.address = str(network.advertise or server.address)
        return server

    async def close(self) -> None:
        """Hang up on all, and listen no more; returns when nothing of host memory is being sent."""
        self._hang_up()
        for _ in range(100):
            with self._lock:
                if not self._connections:
                    return
            await asyncio.sleep(0.02)

    def _hang_up(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for one in connections:
            with contextlib.suppress(OSError):
                # Not that of TLS, which would let its thread send in the clear for a moment.
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                time.sleep(ACCEPT_AGAIN_S)  # out of descriptors, perhaps
                continue
            with self._lock:
                crowded = self._closed or len(self._connections) >= MAX_CONNECTIONS
                if not crowded:
                    self._connections.add(connected)
            if crowded:
                connected.close()
                continue
            serve = threading.Thread(
                target=self._serve, args=(connected,), name="kvstrata-peer", daemon=True
            )
            serve.start()

    def _serve(self, connected: socket.socket) -> None:
        who = "a peer"
        try:
            who = "{}:{}".format(*connected.getpeername()[:2])
            connected.settimeout(HELLO_S)
            if self._tls is not None:
                connected = self._secured(connected, self._tls)
            with contextlib.closing(Channel(connected, HELLO_S)) as channel:
                if self._is_one_of_us(channel, who):
                    self._answer_all(channel)
        except (OSError, KVStrataError) as error:
            if not self._closed:
                logger.info("%s is disconnected: %s", who, error)
        except Exception as error:
            report_bug(self._counters, "a peer's connection", error)
        finally:
            self._forget(connected)

    def _secured(self, connected: socket.socket, tls: ssl.SSLContext) -> ssl.SSLSocket:
        """The same connection by TLS, which is what is to be hung up on from now on.

        Raises:
            OSError: the other end does not speak it.
        """
        secured = tls.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._connections.discard(connected)
            self._connections.add(secured)
        try:
            if self._closed:
                raise ConnectionError("the node has ended")
            secured.do_handshake()
        except BaseException:
            self._forget(secured)
            raise
        return secured

    def _forget(self, connected: socket.socket) -> None:
        connected.close()
        with self._lock:
            self._connections.discard(connected)

    def _is_one_of_us(self, channel: Channel, who: str) -> bool:
        handshake = p.Handshake(self._known, [] if self._by_nixl is None else [p.NIXL])
        hello = p.decode_request(channel.receive())
        if not isinstance(hello, p.Hello):
            raise Incompatible("it does not say hello")
        try:
            channel.send(handshake.answer(hello))
        except Incompatible as error:
            self._counters.add("peers_refused_total", why="version")
            logger.warning("%s is refused: %s", who, error)
            channel.send(p.Refused(str(error)))
            raise
        proof = p.decode_request(channel.receive())
        if isinstance(proof, p.Proof) and handshake.check_client(hello, proof):
            channel.send(p.Welcome())
            return True
        self._counters.add("peers_refused_total", why="secret")
        logger.warning("%s is refused: it has another secret", who)
        channel.send(p.Refused("another secret; copy the deployment's secret_file"))
        return False

    def _answer_all(self, channel: Channel) -> None:
        while True:
            channel.begin(IDLE_S)
            body = channel.receive(rest_s=TIMEOUT_S)
            if not body:
                return
            request = p.decode_request(body)
            channel.begin(TIMEOUT_S)
            match request:
                case p.Ping():
                    self._on_loop(lambda: None)  # a node that hangs says nothing
                    channel.send(p.Welcome())
                case p.Stat(names):
                    channel.send(p.Stats(self._sizes(names)))
                case p.Read(name, most):
                    self._send(channel, name, most)
                case p.Fetch() | p.Watch() if self._fetch is not None:
                    channel.send(self._fetching(self._fetch, request))
                case p.Introduce() if self._by_nixl is not None:
                    channel.send(p.Agent(self._by_nixl.metadata))
                    on_loop = channel.on_loop()
                    Loans(on_loop, self._loop, self._lender, self._by_nixl).serve()
                    return
                case other:
                    raise Incompatible(f"a {type(other).__name__} out of place")

    def _fetching(self, fetch: Fetcher, request: p.Fetch | p.Watch) -> p.Fetching:
        try:
            return self._on_loop(partial(fetch, request))
        except KVStrataError as error:
            return p.Fetching(0, "refused", 0, 0, str(error)[:MAX_WHY_CHARS])

    def _sizes(self, names: Sequence[bytes]) -> list[int]:
        sizes: list[int] = []
        for start in range(0, len(names), SLICE):
            some = names[start : start + SLICE]
            sizes += self._on_loop(partial(self._lender.sizes, some))
        return sizes

    def _send(self, channel: Channel, name: bytes, most: int) -> None:
        # Not on the loop, whose turn would cost as much as the bytes: whether the object lay still
        # is known once it is sent.
        slot = self._lender.find(name)
        if slot is None:
            channel.send(p.Data(0))
        elif slot.nbytes > most:
            channel.send(p.Data(-1))
        else:
            channel.send_object(p.Data(slot.nbytes), self._lender.view(slot))
            stayed = slot.state is SlotState.READY
            channel.send_verdict(p.Sent(stayed))
            if stayed:
                self._note_sent(slot)

    def _note_sent(self, slot: Slot) -> None:
        """Have the loop hear of it, some time soon."""
        self._sent.append(slot)
        if not self._telling:
            self._telling = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._loop.call_later, TELL_S, self._tell_sent)

    def _tell_sent(self) -> None:
        self._telling = False
        while self._sent:
            self._lender.sent(self._sent.popleft(), by="tcp")

    def _on_loop(self, work: Callable[[], R]) -> R:
        """Have it done on the node's loop.

        Raises:
            OSError: not within `TIMEOUT_S`, and then it will not be; or the node has ended.
        """
        done: futures.Future[R] = futures.Future()

        def do() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(do)
        except RuntimeError as error:
            raise ConnectionError("the node has ended") from error
        try:
            return done.result(TIMEOUT_S)
        except futures.TimeoutError as error:
            if done.cancel():
                raise TimeoutError(f"the node has been busy for {TIMEOUT_S:g} s") from error
            return done.result()
