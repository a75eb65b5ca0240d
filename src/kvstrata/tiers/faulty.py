"""A tier that fails on purpose: a wrapper that hurts the verbs of another tier by rules.

::

    tier = FaultyTier(DiskTier(path), sleep=clock.advance)
    tier.inject("read", FlipBit(), times=1)
    tier.inject("write", Raise(TierFull("no space")), skip=3)
    tier.heal()
"""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from kvstrata.errors import UsageError
from kvstrata.tiers.base import Found, Outcome, OwnedTier, Put, Stat
from kvstrata.tiers.journal import Journal

A = TypeVar("A")

Verb = Literal["stat", "read", "headers", "write", "delete", "reject", "touch", "scan", "clear"]


@dataclass(frozen=True)
class Raise:
    """The verb raises; the inner tier is not asked."""

    error: Exception


@dataclass(frozen=True)
class Delay:
    """The verb takes so much longer, in seconds."""

    seconds: float


@dataclass(frozen=True)
class Answer:
    """The inner tier is not asked about the object; this is its outcome."""

    outcome: Outcome = Outcome.FAILED


@dataclass(frozen=True)
class ShortRead:
    """A read ends early and nobody notices: HIT, with zeros behind the first ``keep`` bytes."""

    keep: int = 4096


@dataclass(frozen=True)
class FlipBit:
    """One bit is wrong: in what a read returns, or in what a write stores.

    Args:
        bit: its number, counted from the start of the object; None: any.
    """

    bit: int | None = None


Effect: TypeAlias = Raise | Delay | Answer | ShortRead | FlipBit

_ANYWHERE = (Raise, Delay)
_ALLOWED: dict[str, tuple[type[Effect], ...]] = {
    "stat": (*_ANYWHERE, Answer),
    "read": (*_ANYWHERE, Answer, ShortRead, FlipBit),
    "headers": (*_ANYWHERE, Answer),
    "write": (*_ANYWHERE, Answer, FlipBit),
    "delete": (*_ANYWHERE, Answer),
    "reject": (*_ANYWHERE, Answer),
    "touch": _ANYWHERE,
    "scan": _ANYWHERE,
    "clear": _ANYWHERE,
}


@dataclass
class _Rule:
    effect: Effect
    when: Callable[[bytes], bool]
    skip: int
    times: int | None
    probability: float


class FaultyTier(OwnedTier):
    """A tier that does what the inner one does, except where a rule says otherwise.

    Args:
        inner: the tier that stores; closed with this one.
        seed: of all chances, so that a run can be repeated.
        sleep: what a delay calls, with seconds; a test's clock advances instead.
    """

    def __init__(
        self, inner: OwnedTier, *, seed: int = 0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.limits = inner.limits
        self.num_faults = 0
        self._sleep = sleep
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._rules: dict[str, list[_Rule]] = {verb: [] for verb in _ALLOWED}

    def inject(
        self,
        verb: Verb,
        effect: Effect,
        *,
        when: Callable[[bytes], bool] = lambda object_id: True,
        skip: int = 0,
        times: int | None = None,
        probability: float = 1.0,
    ) -> None:
        """Add a rule. Rules of a verb apply in the order in which they came.

        `Raise` and `Delay` hit a call (of ``scan``: a batch) that has an object with ``when``;
        the others hit each such object.

        Args:
            when: which object ids; not asked for ``scan`` and ``clear``.
            skip: so many matches are let through first.
            times: so many are hit after that; None: all.
            probability: of each of them.
        Raises:
            UsageError: this verb cannot fail in this way.
        """
        if verb not in _ALLOWED or not isinstance(effect, _ALLOWED[verb]):
            raise UsageError(f"{verb!r} cannot be hurt by {effect}")
        with self._lock:
            self._rules[verb].append(_Rule(effect, when, skip, times, probability))

    def heal(self) -> None:
        """Remove all rules."""
        with self._lock:
            for rules in self._rules.values():
                rules.clear()

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
        return self._ask("stat", ids, lambda rows: self.inner.stat([ids[i] for i in rows]))

    def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
        hurt = self._begin("read", ids)
        answers = self._fill(
            hurt, lambda rows: self.inner.read([ids[i] for i in rows], [into[i] for i in rows])
        )
        for i, effects in enumerate(hurt):
            for effect in effects:
                nbytes = answers[i]
                if not isinstance(nbytes, int):
                    break
                answers[i] = int(nbytes)  # a checksum that came with it is of other bytes now
                if isinstance(effect, FlipBit):
                    self._flip(into[i][:nbytes], effect)
                elif isinstance(effect, ShortRead):
                    into[i][effect.keep : nbytes] = bytes(max(0, nbytes - effect.keep))
        return answers

    def headers(self, ids: Sequence[bytes]) -> list[bytes | Outcome]:
        return self._ask("headers", ids, lambda rows: self.inner.headers([ids[i] for i in rows]))

    def write(self, puts: Sequence[Put]) -> list[Outcome]:
        hurt = self._begin("write", [put.object_id for put in puts])
        stored = list(puts)
        for i, effects in enumerate(hurt):
            for effect in effects:
                if isinstance(effect, FlipBit):
                    stored[i] = self._damaged(stored[i], effect)
        return self._fill(hurt, lambda rows: self.inner.write([stored[i] for i in rows]))

    def delete(self, ids: Sequence[bytes], versions: Sequence[str] | None = None) -> list[Outcome]:
        def ask(rows: list[int]) -> list[Outcome]:
            some = None if versions is None else [versions[i] for i in rows]
            return self.inner.delete([ids[i] for i in rows], some)

        return self._ask("delete", ids, ask)

    def reject(self, ids: Sequence[bytes]) -> list[Outcome]:
        return self._ask("reject", ids, lambda rows: self.inner.reject([ids[i] for i in rows]))

    def touch(self, ids: Sequence[bytes]) -> None:
        self._begin("touch", ids)
        self.inner.touch(ids)

    def scan(self) -> Iterator[list[Found]]:
        for batch in self.inner.scan():
            self._begin("scan", None)
            yield batch

    def clear(self) -> None:
        self._begin("clear", None)
        self.inner.clear()

    def bind(self, pool: memoryview) -> None:
        self.inner.bind(pool)

    def close(self) -> None:
        self.inner.close()

    def _ask(
        self, verb: Verb, ids: Sequence[bytes], ask: Callable[[list[int]], list[A]]
    ) -> list[A | Outcome]:
        return self._fill(self._begin(verb, ids), ask)

    def _begin(self, verb: Verb, ids: Sequence[bytes] | None) -> list[list[Effect]]:
        """Delay or raise as the rules say; what is to happen to each object."""
        hurt: list[list[Effect]] = [[] for _ in ids or ()]
        calls: list[Raise | Delay] = []
        with self._lock:
            for rule in self._rules[verb]:
                if isinstance(rule.effect, _ANYWHERE):
                    if (ids is None or any(map(rule.when, ids))) and self._strikes(rule):
                        calls.append(rule.effect)
                else:
                    for effects, object_id in zip(hurt, ids or (), strict=True):
                        if rule.when(object_id) and self._strikes(rule):
                            effects.append(rule.effect)
        for effect in calls:
            if isinstance(effect, Raise):
                raise effect.error
            self._sleep(effect.seconds)
        return hurt

    def _strikes(self, rule: _Rule) -> bool:
        if rule.skip > 0:
            rule.skip -= 1
            return False
        if rule.times == 0 or self._random.random() >= rule.probability:
            return False
        if rule.times is not None:
            rule.times -= 1
        self.num_faults += 1
        return True

    def _fill(
        self, hurt: list[list[Effect]], ask: Callable[[list[int]], list[A]]
    ) -> list[A | Outcome]:
        """Ask the inner tier about the objects that have no answer yet; answers in order."""
        answers = [
            next((effect.outcome for effect in effects if isinstance(effect, Answer)), None)
            for effects in hurt
        ]
        asked = [i for i, answer in enumerate(answers) if answer is None]
        outcomes = iter(ask(asked) if asked else [])
        return [next(outcomes) if answer is None else answer for answer in answers]

    def _damaged(self, put: Put, effect: FlipBit) -> Put:
        page = len(put.header_page)
        whole = memoryview(mmap.mmap(-1, put.nbytes))  # aligned, like the caller's
        whole[:page], whole[page:] = put.header_page, put.payload
        self._flip(whole, effect)
        return put._replace(header_page=whole[:page], payload=whole[page:])

    def _flip(self, data: memoryview, effect: FlipBit) -> None:
        with self._lock:
            bit = self._random.randrange(8 * len(data)) if effect.bit is None else effect.bit
        data[bit // 8] ^= 1 << bit % 8
