"""A tier behind a slow link: a wrapper that lets so many bytes through in a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvstrata.tiers.base import Found, Outcome, OwnedTier, Put, Stat
from kvstrata.tiers.journal import Journal


class ThrottledTier(OwnedTier):
    """The inner tier, with reads that share one link; writes and the other verbs go by.

    Args:
        inner: the tier that stores; closed with this one.
        bytes_per_s: what the link carries; `set_rate` changes it while reads wait.
        clock: monotonic seconds.
        sleep: waits so many seconds; a test's clock advances instead.
    """

    def __init__(
        self,
        inner: OwnedTier,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.limits = inner.limits
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = clock()  # when the link has carried all that was asked for so far

    def set_rate(self, bytes_per_s: float) -> None:
        """Change the link's speed for the reads that begin from now on."""
        self._rate = bytes_per_s

    @property
    def epoch(self) -> int:
        return self.inner.epoch

    @property
    def journal(self) -> Journal:
        return self.inner.journal

    @property
    def read_only_reason(self) -> str:
        return self.inner.read_only_reason

    def stat(self, ids: Sequence[bytes]) -> list[Stat | Outcome]:
        return self.inner.stat(ids)

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        asked = self._clock()
        answers = self.inner.read(ids, into)
        nbytes = sum(answer for answer in answers if isinstance(answer, int))
        with self._lock:
            begins = max(asked, self._free_at)
            self._free_at = ends = begins + nbytes / self._rate
        if (left := ends - self._clock()) > 0:
            self._sleep(left)
        return answers

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        return self.inner.headers(ids)

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        return self.inner.write(puts)

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        return self.inner.delete(ids, versions)

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        return self.inner.reject(ids)

    def touch(self, ids: Sequence[bytes]) -> None:
        self.inner.touch(ids)

    def scan(self) -> Iterator[list[Found]]:
        return self.inner.scan()

    def clear(self) -> None:
        self.inner.clear()

    def bind(self, pool: memoryview) -> None:
        self.inner.bind(pool)

    def close(self) -> None:
        self.inner.close()
