"""What others chose, as a terminal may show it: ids of requests, names of members, errors.

A client or another machine may put into them what moves the cursor, sets a title, turns the
direction of text, or means something to rich.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.text import Text

INSTEAD = "\N{REPLACEMENT CHARACTER}"


def plain(text: object) -> str:
    """One line of printable characters; a control, escape or bidi character is replaced."""
    return "".join(char if char.isprintable() else INSTEAD for char in str(text))


def echo(text: object, *, err: bool = False) -> None:
    """Print one line of it."""
    typer.echo(plain(text), err=err)


def json_text(value: object, indent: int | None = 2) -> str:
    """The same as JSON for programs, in printable ASCII: what is none of it is escaped."""
    return json.dumps(value, indent=indent, ensure_ascii=True, default=str)


def shown(text: object, style: str = "") -> Text:
    """The same for rich, which reads no markup in it."""
    from rich.text import Text

    return Text(plain(text), style=style)


def listed(texts: Iterable[object]) -> Text:
    """Several of them, a line each."""
    from rich.text import Text

    return Text("\n".join(map(plain, texts)))
