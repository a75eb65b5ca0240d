"""What a call asks for beside its answer: that of its context only some tokens are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvstrata.errors import UsageError, did_you_mean
from kvstrata.selection.kept import Kept

ARGUMENT = "kvstrata"
"""Of ``generate``, which takes what a call asks for."""
NAMES = ("selection", "keep", "context")


class Selector(NamedTuple):
    """A method.

    Args:
        identity: of it, its version and every parameter; the budget aside.
        select: model, its exact cache, the context's token ids and the fraction to what is kept.
    """

    identity: str
    select: Callable[[Any, Any, list[int], float], Kept]


@dataclass(frozen=True)
class Wish:
    """A selection that a call asks for.

    Args:
        selector: the method.
        keep: of all rows, above 0, at most 1.
        context: tokens of the prompt that are context and no question; 0: all but the last.
    """

    selector: Selector
    keep: float
    context: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise UsageError(f"keep: {self.keep!r} is no fraction above 0, at most 1")
        if not isinstance(self.context, int) or self.context < 0:
            raise UsageError(f"context: {self.context!r} is no number of tokens")

    def text(self) -> str:
        """For the namespace: whatever decides what is kept."""
        return f"{self.selector.identity} fraction={float(self.keep)!r}"


def wish_of(given: Any, default: Wish | None = None) -> Wish | None:
    """What a call asks for; None: an exact answer.

    Args:
        given: a mapping of `NAMES`; a selection of None asks for an exact answer. None: nothing is
            said.
        default: of the calls that do not say.
    Raises:
        UsageError: an unknown word, or a value that is none.
    """
    if given is None:
        return default
    if not isinstance(given, Mapping):
        raise UsageError(f"kvstrata: {given!r} is no mapping of {', '.join(NAMES)}")
    for name in given:
        if name not in NAMES:
            near = did_you_mean(str(name), NAMES)
            raise UsageError(f"kvstrata: {name!r} is none of {', '.join(NAMES)}{near}")
    if "selection" in given:
        method = given["selection"]
        if method is None:
            return None
        selector = selector_named(method)
        keep: Any = given.get("keep")
    elif default is None:
        raise UsageError(f"kvstrata: {', '.join(given)} of which selection?")
    else:
        selector, keep = default.selector, given.get("keep", default.keep)
    return Wish(selector, keep, given.get("context", 0))


def selector_named(name: Any) -> Selector:
    """A method of `kvstrata.selection`.

    Raises:
        UsageError: there is none of that name, or it takes more than a fraction.
    """
    from kvstrata.selection.budgets import FromTable
    from kvstrata.selection.methods import method_named
    from kvstrata.selection.select import select

    if not isinstance(name, str):
        raise UsageError(f"selection: {name!r} is no name of a method")
    method = method_named(name)
    if isinstance(method.budget, FromTable):
        raise UsageError(f"selection {name!r} takes a table of shares, which no call has")

    def run(model: Any, cache: Any, tokens: list[int], fraction: float) -> Kept:
        return select(model, cache, tokens, method, fraction=fraction)

    return Selector(method.identity(), run)
