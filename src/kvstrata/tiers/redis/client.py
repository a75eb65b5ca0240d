"""A Redis or a cluster, as the tier uses it: few verbs, one deadline, errors translated."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    RedisClusterException,
)
from redis.retry import Retry

from kvstrata.errors import KVStrataError, ReadOnly, TierFull, TierUnavailable
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.redis.address import Address
from kvstrata.tiers.redis.connections import Buffers, PlainConnection, Time, TlsConnection

logger = logging.getLogger(__name__)

Command = Sequence[Any]

STEPS = 2.5
"""A call has the time of so many steps: one that hangs leaves it time to ask somebody else."""
SPARE_CONNECTIONS = 8
"""For questions, which pass what moves bytes."""
SCAN_COUNT = 1000
_ERRORS = (redis.RedisError, RedisClusterException, OSError)
"""All that the library raises on purpose."""
_FULL = ("MISCONF", "OOM")


class Client:
    """Connections to one server or one cluster, made when they are needed; thread-safe.

    Args:
        address: where it is.
        connections: to one server, at most; a few more are for questions.
        timeout_s: within which every call ends.
    """

    def __init__(self, address: Address, connections: int, timeout_s: float) -> None:
        self._address = address
        self._connections = connections + SPARE_CONNECTIONS
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._redis: Any = None
        self._closed = False

    @contextmanager
    def call(self) -> Iterator[Time]:
        """What is done in it has the time of one call.

        Raises:
            TierFull: it takes no more.
            TierUnavailable: it cannot be used; the message says why, and what to do.
        """
        if self._closed:
            raise TierUnavailable("redis: the tier is closed")
        try:
            with Time(self._timeout_s) as time:
                yield time
        except _ERRORS as error:
            self._drop_what_may_be_dead(error)
            raise self._said(error) from error

    def run(self, *command: Any, into: Buffers | None = None) -> Any:
        """One command, and its reply: the length of a value that is received into buffers.

        FAILED for a key of another type.
        """
        options = {} if into is None else {"into": into}
        try:
            return self._client().execute_command(*command, **options)
        except redis.ResponseError as error:
            return _judged(error)

    def batch(self, commands: Sequence[Command]) -> list[Any]:
        """Commands of one key each, in one round trip; FAILED for a key of another type."""
        if not commands:
            return []
        answers = self._pipeline(commands, transaction=False)
        return [_judged(answer) for answer in answers]

    def together(self, commands: Sequence[Command]) -> list[Any]:
        """Commands of one key, and nothing of anybody else in between."""
        answers = self._pipeline(commands, transaction=True)
        return [_judged(answer) for answer in answers]

    def keys(self, pattern: bytes) -> Iterator[bytes]:
        """The keys that match, of all primaries; some may come twice."""
        return iter(self._client().scan_iter(match=pattern, count=SCAN_COUNT))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is done in it changes something, which a user may not be allowed who may read.

        Raises:
            ReadOnly: this one is not.
        """
        try:
            yield
        except NoPermissionError as error:
            raise ReadOnly(self._forbidden("write", error)) from error

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """What is done in it may fail: it would only have freed room."""
        with suppress(*_ERRORS):
            yield

    def close(self) -> None:
        """Close all connections; repeatable."""
        self._closed = True
        with self._lock:
            client, self._redis = self._redis, None
        if client is not None:
            _hang_up(client)

    def _pipeline(self, commands: Sequence[Command], *, transaction: bool) -> list[Any]:
        with self._client().pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _client(self) -> Any:
        client = self._redis
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                raise TierUnavailable("redis: the tier is closed")
            if self._redis is None:
                self._redis = self._cluster() if self._address.cluster else self._single()
            return self._redis

    def _single(self) -> redis.Redis:
        (place,) = self._address.places
        pool = redis.BlockingConnectionPool(
            host=place.host,
            port=place.port,
            db=self._address.db,
            # An idle connection may have died with its server; a question is asked twice then.
            retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            **self._options(),
        )
        return redis.Redis.from_pool(pool)

    def _cluster(self) -> redis.RedisCluster:
        first = self._address.places[0]
        nodes = [ClusterNode(place.host, place.port) for place in self._address.places]
        return redis.RedisCluster(
            # Only a client that is made from a URL takes a class of connections.
            url=f"redis://{first}",
            startup_nodes=nodes,
            retry=Retry(NoBackoff(), 2),
            connection_pool_class=redis.BlockingConnectionPool,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        options = {
            "connection_class": TlsConnection if self._address.tls else PlainConnection,
            "max_connections": self._connections,
            "timeout": self._timeout_s / STEPS,
            "socket_timeout": self._timeout_s / STEPS,
            "socket_keepalive": True,
            "protocol": 2,
            "username": self._address.user or None,
            "password": self._address.password or None,
        }
        names = {"ca_file": "ssl_ca_certs", "cert_file": "ssl_certfile", "key_file": "ssl_keyfile"}
        return {**options, **{names[name]: path for name, path in self._address.files}}

    def _drop_what_may_be_dead(self, error: Exception) -> None:
        """So that the next call finds out at once who is alive, not connection by connection."""
        if isinstance(error, redis.ResponseError):
            return
        with self._lock:
            client = self._redis
            lost = isinstance(error, RedisClusterException)
            if lost:
                self._redis = None  # to begin anew with the addresses that were configured
        if lost and client is not None:
            _hang_up(client)
        elif isinstance(client, redis.Redis):
            client.connection_pool.disconnect(inuse_connections=False)

    @property
    def _where(self) -> str:
        return ", ".join(map(str, self._address.places))

    @property
    def _who(self) -> str:
        return f"user {self._address.user!r}" if self._address.user else "the default user"

    def _forbidden(self, what: str, error: Exception) -> str:
        return (
            f"redis at {self._where} does not let {self._who} {what}: "
            f"{' '.join(str(error).split())}; docs/redis.md has the rule for its access list"
        )

    def _said(self, error: Exception) -> KVStrataError:
        """What an error of the library is to a node."""
        if isinstance(error, RedisClusterException) and isinstance(error.__cause__, _ERRORS):
            error = error.__cause__  # why no server of the cluster could be asked for the others
        text = " ".join(str(error).split())
        where = self._where
        full = isinstance(error, OutOfMemoryError) or text.startswith(_FULL)
        if full:
            return TierFull(f"redis at {where} takes no more: {text}")
        if isinstance(error, AuthenticationError | AuthorizationError):
            return TierUnavailable(
                f"redis at {where} does not let {self._who} in: {text}; see the user and the "
                "password in redis.url"
            )
        if isinstance(error, NoPermissionError):
            return TierUnavailable(self._forbidden("do what the tier needs", error))
        if isinstance(error, AskError):
            return TierUnavailable(
                f"redis at {where} is one server of a cluster; begin redis.url with "
                "redis+cluster:// or rediss+cluster://"
            )
        return TierUnavailable(f"redis at {where}: {text or type(error).__name__}")


def _hang_up(client: Any) -> None:
    with suppress(*_ERRORS):
        if isinstance(client, redis.RedisCluster):
            # Its `close` leaves them open, and is no good to threads that are in it.
            client.disconnect_connection_pools()
        else:
            client.close()


def _judged(answer: Any) -> Any:
    if isinstance(answer, redis.ResponseError) and str(answer).startswith("WRONGTYPE"):
        return Outcome.FAILED
    if isinstance(answer, Exception):
        raise answer
    return answer
