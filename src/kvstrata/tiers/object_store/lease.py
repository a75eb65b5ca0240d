"""Which node of a fleet may sweep: the one whose lease lies in the store.

No two clocks are compared. The holder writes the lease again at each step, and relies on it for
half of its time, counted by its own clock from before it began to write. Another node takes it over
once it has looked at one and the same writing for the whole of that time, by its own clock, from
after it had read it; and only on the condition that the store still has that writing. So whatever
the holder began while it relied on the lease has the other half of the time to end.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable

from kvstrata.tiers.object_store.client import ObjectClient, Turn
from kvstrata.tiers.object_store.paths import LEASE

logger = logging.getLogger(__name__)

LEASE_S = 60.0

_LINE = re.compile(rb"kvstrata-lease 1 ([0-9a-f]{16}) ([0-9]{1,18}) ([1-9][0-9]{0,6})\n")


class Lease:
    """One node's view of it; one caller at a time.

    Args:
        client: of the store.
        lasts_s: for how long nobody takes it from a holder that has fallen silent.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: ObjectClient,
        lasts_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.holder = secrets.token_hex(8)
        self.now_s = 0.0
        """The store's own time when the lease was written last, Unix seconds."""
        self._client = client
        self._lasts_s = lasts_s
        self._clock = clock
        self._number = 0
        self._until = -math.inf
        self._seen: bytes | None = None
        self._seen_since = -math.inf

    @property
    def held(self) -> bool:
        """Whether this node may begin something that only one may do."""
        return self._clock() < self._until

    def hold(self, turn: Turn) -> bool:
        """Take the lease, or write it again; False while another node has it.

        Raises:
            TierUnavailable: the store cannot be asked.
        """
        begun = self._clock()
        found = self._client.small(LEASE, turn)
        self._number += 1
        ms = round(1000 * self._lasts_s)
        line = f"kvstrata-lease 1 {self.holder} {self._number} {ms}\n".encode()
        if found is None:
            written = self._client.put(LEASE, [line], turn, create=True)
        elif self._may_replace(found[0]):
            self.now_s = found[1].written_s
            written = self._client.replace(LEASE, line, found[1].condition, turn)
        else:
            written = False
        if written and not self.held:
            logger.info("%s: this node sweeps", self._client.url)
        self._until = begun + self._lasts_s / 2 if written else -math.inf
        return written and self.held

    def _may_replace(self, line: bytes) -> bool:
        """Whether it is ours, or its holder has been silent for too long."""
        words = _LINE.fullmatch(line)
        if words is not None and words[1].decode() == self.holder:
            return True
        if line != self._seen:
            self._seen, self._seen_since = line, self._clock()
        lasts_s = int(words[3]) / 1000 if words is not None else self._lasts_s
        return self._clock() - self._seen_since >= lasts_s
