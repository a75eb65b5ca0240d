"""Numbers that an option may be, said in words where it is another."""

from __future__ import annotations

from collections.abc import Callable

import typer

MAX_TIMEOUT_S = 7 * 86400.0


def seconds(least: float, most: float = MAX_TIMEOUT_S) -> Callable[[float], float]:
    """A check of an option in seconds, both ends allowed; what is not a number is neither."""

    def check(value: float) -> float:
        if not least <= value <= most:
            raise typer.BadParameter(f"{value:g} s; expected {least:g} to {most:g}")
        return value

    return check
