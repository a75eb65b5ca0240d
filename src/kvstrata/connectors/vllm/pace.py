"""How long the engine's steps and its copies take, and how much of a step may be spent on a wait.

A request that is told to ask again loses a whole step; one that the engine waits for holds up all
that run. So a wait is worth it where it is short against a step, and only there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from statistics import median

#: of a step that others run in, what may be spent on waiting
WAIT_SHARE = 0.05
#: and on copying what a synchronous load brings
COPY_SHARE = 0.2
#: a step of fewer tokens says nothing about what a token of a prompt takes
MANY_TOKENS = 32
NUM_REMEMBERED = 16
#: of a step that took so much longer than the others say nothing but that something else went on
OUTLIER = 2.0


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
        self._began: tuple[float, int, float] | None = None
        self.computing = Computing()
        self._waited_s = 0.0
        self._copying_s = 0.0

    def step(self, num_tokens: int, num_pairs: float = 0.0) -> None:
        """A step has been planned and begins; what comes now is part of the next one's planning.

        Args:
            num_tokens: that it computes.
            num_pairs: of these with tokens before them in their prompts.
        """
        self.rest()
        if num_tokens:
            self._began = self.clock(), num_tokens, num_pairs
        self._waited_s = self._copying_s = 0.0

    def rest(self) -> None:
        """The last step is over, and what follows is not part of it."""
        if self._began is not None:
            began, num_tokens, num_pairs = self._began
            seconds = self.clock() - began
            self._steps.append(seconds)
            if num_tokens >= MANY_TOKENS:
                self._tokens.append(seconds / num_tokens)
                self.computing.note(num_tokens, num_pairs, seconds)
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


class Computing:
    """What computing a prompt takes: so much a token, and more for each token before it.

    The two are fitted to the last steps by least squares, neither below zero.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=4 * NUM_REMEMBERED)
        self._fitted: tuple[float, float] | None = None

    def note(self, num_tokens: int, num_pairs: float, seconds: float) -> None:
        """A step computed so many tokens, that had so many tokens before them in all."""
        self._steps.append((float(num_tokens), num_pairs, seconds))
        self._fitted = None

    def speeds(self) -> tuple[float, float]:
        """Seconds for a token, and besides for each one before it; zeros before the first step."""
        if self._fitted is None:
            first = _fit(self._steps)
            usual = [
                step
                for step in self._steps
                if step[2] <= OUTLIER * (first[0] * step[0] + first[1] * step[1])
            ]
            self._fitted = _fit(usual or self._steps)
        return self._fitted


def _fit(steps: Collection[tuple[float, float, float]]) -> tuple[float, float]:
    """The a and b, not negative, for which a x + b y comes nearest to t."""
    xx = sum(x * x for x, _, _ in steps)
    yy = sum(y * y for _, y, _ in steps)
    xy = sum(x * y for x, y, _ in steps)
    xt = sum(x * t for x, _, t in steps)
    yt = sum(y * t for _, y, t in steps)
    if not xx:
        return 0.0, 0.0
    # Steps that are all alike tell the two apart no better than by chance.
    determinant = xx * yy - xy * xy
    if determinant > 1e-3 * xx * yy:
        a, b = (xt * yy - yt * xy) / determinant, (yt * xx - xt * xy) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, yt / yy
    return xt / xx, 0.0
