"""How long the engine's steps and its copies take, and how much of a step may be spent on a wait.

A request that is told to ask again loses a whole step; one that the engine waits for holds up all
that run. So a wait is worth it where it is short against a step, and only there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

#: of a step that others run in, what may be spent on waiting
WAIT_SHARE = 0.05
#: and on copying what a synchronous load brings
COPY_SHARE = 0.2
#: a step of fewer tokens says nothing about what a token of a prompt takes
MANY_TOKENS = 32
NUM_REMEMBERED = 16


class Pace:
    """The engine's recent steps, as its scheduler sees them, and what is left of the next one.

    Args:
        longest_s: nothing in a step waits longer, whatever a step takes.
        clock: seconds, monotonic.
    """

    def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s = longest_s
        self.clock = clock
        self._steps: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._tokens: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self._began: tuple[float, int] | None = None
        self._waited_s = 0.0
        self._copying_s = 0.0

    def step(self, num_tokens: int) -> None:
        """A step has been planned and begins; what comes now is part of the next one's planning."""
        self.rest()
        if num_tokens:
            self._began = self.clock(), num_tokens
        self._waited_s = self._copying_s = 0.0

    def rest(self) -> None:
        """The last step is over, and what follows is not part of it."""
        if self._began is not None:
            began, num_tokens = self._began
            seconds = self.clock() - began
            self._steps.append(seconds)
            if num_tokens >= MANY_TOKENS:
                self._tokens.append(seconds / num_tokens)
            self._began = None

    def step_s(self, num_tokens: int = 0) -> float:
        """What a step takes in which one request computes so many tokens; 0 if that is unknown."""
        usual = median(self._steps) if self._steps else 0.0
        return max(usual, num_tokens * (median(self._tokens) if self._tokens else 0.0))

    def patience_s(self, *, busy: bool) -> float:
        """What may still be waited in this step, over all requests together.

        Args:
            busy: whether requests run that the wait would hold up.
        """
        most = min(self._longest_s, WAIT_SHARE * self.step_s()) if busy else self._longest_s
        return max(0.0, most - self._waited_s)

    def waited(self, seconds: float) -> None:
        """So much of this step was spent on a wait."""
        self._waited_s += seconds

    def is_short(self, copy_s: float, num_tokens: int) -> bool:
        """Whether a copy is short against the step that it would be part of.

        Args:
            copy_s: what the copy takes.
            num_tokens: what its request computes in that step.
        """
        return self._copying_s + copy_s <= COPY_SHARE * self.step_s(num_tokens)

    def copies(self, seconds: float) -> None:
        """So much of this step will be spent on copies."""
        self._copying_s += seconds


class Rate:
    """How fast copies are: the best of the last few, since what disturbs one makes it slower."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=NUM_REMEMBERED)

    def note(self, nbytes: int, seconds: float) -> None:
        """A copy has ended. Any thread may say so."""
        if nbytes and seconds > 0:
            self._rates.append(nbytes / seconds)

    def best(self) -> float:
        """Bytes per second; 0 before the first copy."""
        return max(tuple(self._rates), default=0.0)
