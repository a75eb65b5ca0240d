"""A connection to the node that comes back: the engine never waits for it, and never dies of it."""

from __future__ import annotations

import logging
import threading

from kvstrata.config import Config
from kvstrata.errors import KVStrataError
from kvstrata.wire.client import NodeClient
from kvstrata.wire.launch import connect

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 0.25, 2.0
MOST_BUGS = 5
"""Attempts that may end in what nobody foresaw: each of them may have started a node."""


class Link:
    """Attaches to the configured node in the background, again and again until it succeeds, or
    until it has died of bugs too often.

    Args:
        config: says which node.
        who: for the log.
    """

    def __init__(self, config: Config, who: str) -> None:
        self._config = config
        self._who = who
        self._client: NodeClient | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._tried = threading.Event()

    def start(self) -> None:
        """Begin to attach, unless that is under way."""
        with self._lock:
            if self._thread or self._client or self._closing.is_set():
                return
            self._thread = threading.Thread(
                target=self._attach, name="kvstrata-attach", daemon=True
            )
            self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until the first attempt has ended, well or not."""
        self._tried.wait(timeout_s)

    def take(self) -> NodeClient | None:
        """The client of a finished attempt, once; the caller closes it."""
        with self._lock:
            client, self._client = self._client, None
        return client

    def close(self) -> None:
        """Attach no more. Repeatable."""
        self._closing.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)
        if (client := self.take()) is not None:
            client.close()

    def _attach(self) -> None:
        delay, told, num_bugs = FIRST_RETRY_S, False, 0
        try:
            while not self._closing.is_set():
                try:
                    client = self._attached()
                except (KVStrataError, OSError) as error:
                    if not told:
                        logger.warning(
                            "KVStrata: the %s has no node, the engine computes everything; "
                            "it keeps trying: %s", self._who, error,
                        )  # fmt: skip
                        told = True
                except Exception:
                    num_bugs += 1
                    if num_bugs == 1:
                        logger.exception(
                            "KVStrata: attaching the %s died of a bug, the engine computes "
                            "everything; it is tried again", self._who,
                        )  # fmt: skip
                    if num_bugs == MOST_BUGS:
                        logger.error(
                            "KVStrata: attaching the %s died of bugs %d times; it is not tried "
                            "again", self._who, num_bugs,
                        )  # fmt: skip
                        return
                else:
                    with self._lock:
                        # One step: between two, a second thread would attach a second client.
                        self._client, self._thread = client, None
                    if self._closing.is_set() and (late := self.take()) is not None:
                        late.close()
                    return
                self._tried.set()
                self._closing.wait(delay)
                delay = min(2 * delay, LONGEST_RETRY_S)
        finally:
            self._tried.set()

    def _attached(self) -> NodeClient:
        client = connect(self._config)
        try:
            client.pool.populate()
        except BaseException:
            client.close()
            raise
        logger.info(
            "KVStrata: the %s is attached to node %d, %.2f GiB of host memory",
            self._who, client.hello.pid, client.hello.capacity_bytes / 2**30,
        )  # fmt: skip
        return client
