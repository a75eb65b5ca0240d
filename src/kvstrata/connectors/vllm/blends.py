"""Prompts that are put together of what was computed elsewhere, and of what is computed here.

Threads copy stored rows into their blocks as they arrive (`gathering`); what has not come in time
is a gap. Then the engine's main thread computes, in slices after each step's own forward: for a
plan that asks for it how much the rows differ from what they would be here (`deviation`), and then,
in ascending order, the gaps and the tokens that the plan chooses.

Ranks agree before each of these: the same messages reach all of them in the same steps, what each
has to say of its own copies is compared (`Forward.agree`), and all of them go on by the same
numbers.

Source: CacheBlend, arXiv:2405.16444; differs: any tokens are computed at once by the model's own
forward, not layer by layer, so those of the first layers choose for all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstrata.blend import BY_DEVIATION, budget, choose, stretches
from kvstrata.connectors.vllm.messages import Blend, Piece
from kvstrata.errors import UsageError

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


class Computes(Protocol):
    """What `engine.Forward` does, as far as it takes that."""

    def compute(
        self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[int]
    ) -> None: ...

    def agree(self, numbers: list[int]) -> list[int]: ...

    def add_up(self, numbers: Floats) -> Floats: ...


class Deviates(Protocol):
    """What `deviation.Check` does."""

    def deviation(self, blend: Blend, positions: range) -> Floats:
        """How far the rows at these positions are off; computes what it takes to know."""
        ...


class BlendJob:
    """One blend under way.

    Args:
        blend: what is to be done.

    Raises:
        UsageError: it makes no sense.
    """

    def __init__(self, blend: Blend) -> None:
        self.blend = blend
        self.end = len(blend.tokens)
        # What vLLM has itself is exact, whatever else was found.
        self.first = max(blend.first, blend.start)
        if not blend.start < self.end:
            raise UsageError(f"a blend from {blend.start} to {self.end}")
        self._lock = threading.Lock()
        self._num_threads = 0
        self._came = [0] * len(blend.pieces)
        self._wanted = True
        # for the main thread alone
        self.failed = False
        self.prepared = False
        self.reused: list[range] = []
        self._gaps: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.unchecked = range(0)  # positions whose deviation is still to be known
        self.off: Floats = np.zeros(0, np.float32)
        self.todo: list[int] = []  # positions to compute
        self.done = 0  # of these

    # for the threads that copy

    def begin(self, num_threads: int) -> None:
        """So many are about to copy."""
        with self._lock:
            self._num_threads = num_threads

    def thread_ended(self) -> None:
        """One of them writes nothing any more."""
        with self._lock:
            self._num_threads -= 1

    @property
    def wanted(self) -> bool:
        """Whether anything is to be copied at all; once it is not, it never is again."""
        with self._lock:
            return self._wanted

    def came(self, rows: list[tuple[int, int]]) -> None:
        """These lie in their blocks: numbers of pieces, and how many of the rows of each."""
        with self._lock:
            for piece, count in rows:
                self._came[piece] += count

    # for the main thread

    def give_up(self) -> None:
        """Nothing is copied any more, soon."""
        with self._lock:
            self._wanted = False

    @property
    def copying(self) -> bool:
        """Whether a thread may still write to its blocks."""
        with self._lock:
            return self._num_threads > 0

    def lost(self) -> list[int]:
        """For each piece whether rows of it did not come."""
        with self._lock:
            return [
                int(came < len(self._mine(piece)))
                for piece, came in zip(self.blend.pieces, self._came, strict=True)
            ]

    def prepare(self, lost: Sequence[int]) -> None:
        """Find out what is to be computed, once it is known what did not come.

        Raises:
            UsageError: the blend makes no sense.
        """
        blend = self.blend
        there = np.zeros(self.end, bool)
        here: list[tuple[int, int, int]] = []
        for piece, gone in zip(blend.pieces, lost, strict=True):
            mine = self._mine(piece)
            if not gone and mine:
                there[mine.start : mine.stop] = True
                here.append((mine.start, piece.was + mine.start - piece.position, len(mine)))
        self.reused = stretches(here, self.first)
        self._gaps = np.flatnonzero(~there[blend.start :]) + blend.start
        self.prepared = True
        count = budget(blend.plan, blend.ratio, sum(map(len, self.reused)))
        if blend.plan in BY_DEVIATION and count:
            # What lies before is there, in the first layer at least; a gap is not.
            begin = min([*self._gaps[:1].tolist(), self.first])
            self.unchecked = range(begin, self.reused[-1].stop)
            self.off = np.zeros(self.end, np.float32)
        else:
            self.choose(None)

    def choose(self, off: Floats | None) -> None:
        """Decide which of the reused tokens are computed, and so all that is."""
        blend, deviation = self.blend, None
        if off is not None:
            deviation = np.concatenate([off[one.start : one.stop] for one in self.reused])
        elif blend.plan in BY_DEVIATION:
            deviation = np.zeros(sum(map(len, self.reused)), np.float32)
        chosen = choose(blend.plan, blend.ratio, self.reused, deviation, blend.seed, blend.bound)
        self.todo = np.union1d(self._gaps, np.array(chosen, np.int64)).tolist()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self.prepared and not self.unchecked and self.done == len(self.todo)

    def _mine(self, piece: Piece) -> range:
        """Positions of the rows of a piece that vLLM does not have."""
        return range(
            max(piece.position, self.blend.start), min(piece.position + piece.count, self.end)
        )


class Ended(NamedTuple):
    """A blend that has ended.

    Args:
        request_id: whose.
        num_computed: tokens that were computed of it.
        failed: whether its blocks hold nothing of use.
    """

    request_id: str
    num_computed: int
    failed: bool


class Blends:
    """The blends under way in one worker, in the order in which they began.

    Args:
        forward: computes.
        check: says how far rows are off.
    """

    def __init__(self, forward: Computes, check: Deviates) -> None:
        self._forward, self._check = forward, check
        self._under_way: dict[str, BlendJob] = {}
        self._unwanted: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin(self, job: BlendJob) -> None:
        """A blend of this step; on every rank."""
        self._under_way[job.blend.request_id] = job

    def call_off(self, request_ids: set[str]) -> None:
        """These requests have ended: nothing is computed for them. All ranks hear it at once."""
        self._unwanted |= request_ids & self._under_way.keys()

    def close(self) -> None:
        """Let their threads end; nothing is computed any more. Repeatable."""
        for job in self._under_way.values():
            job.give_up()

    def step(self, most_tokens: int) -> tuple[list[Ended], bool]:
        """Compute a slice of one of them, see who is done.

        Args:
            most_tokens: that may be computed.
        Returns:
            Those that have ended, whose request may have its blocks back; and whether anything was
            computed.
        """
        ended = self._end()
        for job in self._under_way.values():
            if job.prepared and most_tokens > 0:
                self._compute(job, most_tokens)
                return ended + self._end(), True
        return ended, False

    def _end(self) -> list[Ended]:
        """Which of them have ended; those that have all their copies are prepared."""
        each = list(self._under_way.values())
        if not each:
            return []
        told = [number for one in each for number in (int(one.copying), int(one.failed))]
        said = self._forward.agree(told)
        ready = []
        for one, copying, failed in zip(each, said[::2], said[1::2], strict=True):
            if failed or one.blend.request_id in self._unwanted:
                one.failed = True
                one.give_up()
            elif not copying and not one.prepared:
                ready.append(one)
        if ready:
            self._prepare(ready)
        ended = []
        for one, copying in zip(each, said[::2], strict=True):
            if not copying and (one.failed or one.complete):
                ended.append(Ended(one.blend.request_id, one.done, one.failed))
        for name, _, _ in ended:
            del self._under_way[name]
            self._unwanted.discard(name)
        return ended

    def _prepare(self, ready: list[BlendJob]) -> None:
        lost = self._forward.agree([gone for one in ready for gone in one.lost()])
        for one in ready:
            mine, lost = lost[: len(one.blend.pieces)], lost[len(one.blend.pieces) :]
            try:
                one.prepare(mine)
            except UsageError as error:
                # Of what all ranks have alike, so that all of them say so.
                logger.warning("KVStrata: request %s: %s", one.blend.request_id, error)
                one.failed = True

    def _compute(self, job: BlendJob, most_tokens: int) -> None:
        """A slice of one of them."""
        try:
            if job.unchecked:
                self._check_some(job, most_tokens)
            else:
                some = job.todo[job.done : job.done + most_tokens]
                tokens = [job.blend.tokens[position] for position in some]
                self._forward.compute(tokens, some, job.blend.table)
                job.done += len(some)
        except Exception:
            name = job.blend.request_id
            logger.exception("KVStrata: computing inside a blend failed, request %s", name)
            job.failed = True

    def _check_some(self, job: BlendJob, most_tokens: int) -> None:
        some, rest = job.unchecked[:most_tokens], job.unchecked[most_tokens:]
        job.off[some.start : some.stop] = self._check.deviation(job.blend, some)
        job.unchecked = rest
        if not rest:
            job.choose(self._forward.add_up(job.off))
