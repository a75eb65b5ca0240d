"""Loads that are computed from the front while they arrive from the end, until the two meet.

What is loaded and what is computed are the same KV, so where they meet changes nothing but
rounding, as any other split of a prompt. A thread copies chunks into their blocks as they arrive,
the last first; the engine's main thread computes the first ones in slices, after each step's
forward. Who wants a chunk takes it first, under the meeting's lock, and no chunk has two takers:
what is computed lies below `limit`, where nothing is copied any more.

Ranks agree on each slice, and on the end, before they begin it: the same messages reach all of them
in the same steps, what each has to say of its own copies is compared (`Forward.agree`), and all of
them decide by the same numbers.

Source: Cake, arXiv:2410.03065; differs: what is computed is decided a slice at a time by what has
arrived, and an engine that is busy with others computes less of it or nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from kvstrata.connectors.vllm.engine import Forward
from kvstrata.connectors.vllm.messages import Load

logger = logging.getLogger(__name__)

SHARE = 4
"""A slice is this part of what neither side has yet: so the two are not far apart at the end."""


class Meeting:
    """One load, and who has which of its chunks; chunks are numbered as in the prompt.

    Args:
        load: with a front.
        chunk_tokens: of a chunk.
    """

    def __init__(self, load: Load, chunk_tokens: int) -> None:
        assert load.front is not None
        self.load, self.front = load, load.front
        self.end = load.first_chunk + len(load.keys)
        self._chunk = chunk_tokens
        self.lock = threading.Lock()
        self.ready = False  # whether what comes before the first chunk to compute is there
        self.computed = load.first_chunk  # the first chunk that is not there yet, from the front
        self.limit = load.first_chunk  # nothing below is copied any more
        self.taken = self.end  # chunks from here on were copied, or are about to be
        self.loaded = self.end  # and from here on they lie in their blocks
        self.failed = False  # one did not come, or could not be computed
        self.met = False  # all of it is there
        self.over = False  # nothing is copied any more, and its request has been told or will be

    # for the thread that copies

    def begin(self, head: int) -> None:
        """The chunks before number ``head`` are there, and need not be computed."""
        with self.lock:
            self.computed = self.limit = head
            self.ready = True

    @property
    def wanted(self) -> bool:
        """Whether anything is to be copied at all; once it is not, it never is again."""
        with self.lock:
            return not self.over

    def take(self, first: int) -> range:
        """Take the chunks from ``first`` to the last taken ones, as far as they are wanted."""
        with self.lock:
            some = range(self.taken if self.over else max(first, self.limit), self.taken)
            self.taken = min(some.start, self.taken)
            return some

    def copied(self) -> None:
        """What was taken lies in its blocks."""
        with self.lock:
            self.loaded = self.taken

    @property
    def wants_more(self) -> bool:
        """Whether a chunk before the ones that were taken is still to be copied."""
        with self.lock:
            return not self.over and self.taken > self.limit

    def fail(self) -> None:
        """What was not copied so far does not come."""
        with self.lock:
            self.failed = True
            self.taken = self.loaded

    # for the main thread, which holds the lock

    def told(self) -> list[int]:
        """What this rank has to say; of all ranks' the largest numbers count."""
        # What comes before the first chunk to compute is copied before it is `ready`.
        copying = self.loaded > self.taken or not (self.ready or self.failed)
        return [-self.taken, self.loaded, not self.ready, self.failed, copying]

    def slice(self, taken: int, most_tokens: int) -> range:
        """The next chunks to compute, with no more tokens than that; perhaps none."""
        gap = taken - self.computed
        fit = (most_tokens + self._start(self.computed)) // self._chunk - self.computed
        count = min(gap, fit, max(1, gap // SHARE))
        return range(self.computed, self.computed + max(0, count))

    def positions(self, chunks: range) -> range:
        """Positions of the tokens to compute for these chunks."""
        return range(self._start(chunks.start), chunks.stop * self._chunk)

    def _start(self, chunk: int) -> int:
        return max(self.front.start, chunk * self._chunk)


class Meetings:
    """The meetings under way in one worker, in the order in which they began.

    Args:
        forward: computes.
        chunk_tokens: of a chunk.
    """

    def __init__(self, forward: Forward, chunk_tokens: int) -> None:
        self._forward = forward
        self._chunk = chunk_tokens
        self._under_way: dict[str, Meeting] = {}
        self._unwanted: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin(self, load: Load) -> Meeting:
        """A load of this step; on every rank."""
        meeting = Meeting(load, self._chunk)
        self._under_way[load.request_id] = meeting
        return meeting

    def call_off(self, request_ids: set[str]) -> None:
        """These requests have ended: nothing is computed for them. All ranks hear it at once."""
        self._unwanted |= request_ids & self._under_way.keys()

    def close(self) -> None:
        """Let their threads end; nothing is computed any more. Repeatable."""
        for meeting in self._under_way.values():
            with meeting.lock:
                meeting.over = True

    def step(self, most_tokens: int) -> tuple[list[Meeting], bool]:
        """Compute a slice of one of them, see who has met.

        Args:
            most_tokens: that may be computed.
        Returns:
            Those that have ended, whose request may have its blocks back; and whether anything was
            computed.
        """
        ended, work = self._decide(most_tokens)
        if work is None:
            return ended, False
        meeting, chunks = work
        self._compute(meeting, chunks)
        return ended + self._decide(0)[0], True

    def _decide(self, most_tokens: int) -> tuple[list[Meeting], tuple[Meeting, range] | None]:
        """Which of them have ended, and what to compute now; the same on all ranks."""
        ended: list[Meeting] = []
        work: tuple[Meeting, range] | None = None
        each = list(self._under_way.values())
        with contextlib.ExitStack() as held:
            # Nothing is taken while the ranks agree, so that what they say stays true.
            for meeting in each:
                held.enter_context(meeting.lock)
            said = self._forward.agree([number for one in each for number in one.told()])
            for i, meeting in enumerate(each):
                minus_taken, loaded, waits, failed, copying = said[5 * i : 5 * i + 5]
                if not waits and loaded <= meeting.computed:
                    meeting.over = meeting.met = True
                    ended.append(meeting)
                elif failed or meeting.load.request_id in self._unwanted:
                    meeting.over = True
                    if not copying:
                        ended.append(meeting)
                elif waits:
                    continue
                elif work is None and (chunks := meeting.slice(-minus_taken, most_tokens)):
                    work = meeting, chunks
                    meeting.limit = chunks.stop
                else:
                    # Where one rank has taken more than another, the other catches up.
                    meeting.limit = max(meeting.limit, meeting.computed)
        for meeting in ended:
            del self._under_way[meeting.load.request_id]
            self._unwanted.discard(meeting.load.request_id)
        return ended, work

    def _compute(self, meeting: Meeting, chunks: range) -> None:
        front, positions = meeting.front, meeting.positions(chunks)
        try:
            self._forward.compute(
                front.tokens[positions.start : positions.stop], positions, front.table
            )
        except Exception:
            logger.exception(
                "KVStrata: computing inside a load failed, request %s", meeting.load.request_id
            )
            with meeting.lock:
                meeting.failed = True
        else:
            meeting.computed = chunks.stop
