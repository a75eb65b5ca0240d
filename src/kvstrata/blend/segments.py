"""What a request names of its prompt: texts that other prompts may hold elsewhere.

It comes from somebody who is not trusted, so it may be anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from kvstrata.blend.plans import Rule
from kvstrata.errors import UsageError
from kvstrata.keys import Tokens, token_ids

MAX_SEGMENTS = 128
"""Each is a question to the node."""
MIN_TOKENS = 16
"""What is shorter is computed: it saves less than it costs."""
MAX_SEPARATOR_CHARS = 256
MAX_QUALITY_CHARS = 128
USUAL_RATIO = 0.15
"""Of the reused tokens, how many a plan computes anew that names neither a ratio nor a bound."""

_Position = Annotated[int, Meta(ge=0, le=1 << 40)]


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hint ``blend``, decoded; ``docs/blend.md`` says what each word means.

    ``plan`` and ``quality`` both absent: the texts are only named, so that others find them.
    """

    segments: (
        Annotated[list[tuple[_Position, _Position]], Meta(min_length=1, max_length=MAX_SEGMENTS)]
        | Literal["auto"]
        | None
    ) = None
    separator: Annotated[str, Meta(min_length=1, max_length=MAX_SEPARATOR_CHARS)] | None = None
    plan: Literal["edges", "anchors", "deviation", "share", "random", "all", "none"] | None = None
    ratio: Annotated[float, Meta(ge=0, le=1)] | None = None
    bound: Annotated[float, Meta(ge=0, le=1)] | None = None
    quality: Annotated[str, Meta(min_length=1, max_length=MAX_QUALITY_CHARS)] | None = None

    @property
    def wants_more(self) -> bool:
        """Whether KV of other prompts may be put into this one."""
        return self.plan is not None or self.quality is not None

    @property
    def rule(self) -> Rule:
        """What the plan computes anew; there must be one."""
        assert self.plan is not None
        # What says itself how many has a ratio as its cap, if it has one.
        usual = USUAL_RATIO if self.bound is None and self.plan != "share" else 1.0
        return Rule(self.plan, usual if self.ratio is None else self.ratio, self.bound)

    def shown(self) -> dict[str, Any]:
        """For a record: short, whatever was said."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        shown = {name: value for name, value in said.items() if value is not None}
        if isinstance(self.segments, list):
            shown["segments"] = len(self.segments)
        if self.separator is not None:
            shown["separator"] = ascii(self.separator)[1:-1]
        return shown


def asked(value: Any) -> Asked:
    """Decode the hint.

    Raises:
        ValueError: it is none; the message says why.
    """
    said = msgspec.convert(value, Asked)
    if (said.segments is None) == (said.separator is None):
        raise ValueError("Expected either segments or separator")
    if said.plan is not None and said.quality is not None:
        raise ValueError("Expected either plan or quality")
    if said.ratio is not None and said.plan is None:
        raise ValueError("Expected a plan with ratio")
    if said.bound is not None and said.plan != "deviation":
        raise ValueError("Expected the plan deviation with bound")
    return said


def named(segments: Sequence[tuple[int, int]], num_tokens: int) -> list[range]:
    """The segments that a request lists, in the order of its prompt.

    Args:
        segments: of each the position of its first token, and that behind its last.
        num_tokens: of the prompt.
    Raises:
        UsageError: one is empty, ends behind the prompt, or lies over another.
    """
    found: list[range] = []
    for start, stop in sorted(segments):
        if not start < stop <= num_tokens:
            raise UsageError(f"[{start}, {stop}) is no part of a prompt of {num_tokens} tokens")
        if found and start < found[-1].stop:
            raise UsageError(f"[{start}, {stop}) lies over another segment")
        found.append(range(start, stop))
    return found


def separated(tokens: Tokens, separator: Sequence[int]) -> list[range]:
    """The segments that end at a separator; what lies behind the last one is none.

    The separators themselves belong to none, and the first one counts where two overlap.

    Args:
        tokens: ids of the prompt.
        separator: ids, at least one.
    Raises:
        UsageError: there are more than `MAX_SEGMENTS`, or the separator is empty.
    """
    if not len(separator):
        raise UsageError("the separator has no tokens")
    ids, size = token_ids(tokens), len(separator)
    found: list[range] = []
    if len(ids) < size:
        return found
    fits = np.ones(len(ids) - size + 1, bool)
    for number, one in enumerate(separator):
        fits &= ids[number : number + len(fits)] == one
    start = behind = 0
    for place in np.flatnonzero(fits).tolist():
        if place < behind:
            continue
        if place > start:
            found.append(range(start, place))
        start = behind = place + size
    if len(found) > MAX_SEGMENTS:
        raise UsageError(f"{len(found)} segments; {MAX_SEGMENTS} at most")
    return found
