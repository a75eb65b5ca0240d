"""Write the tables of methods in docs/selection.md from the code that composes them.

They stand between two comments; what is around them is written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvstrata.selection.methods import METHODS, NOT_COMPOSED, Method
from kvstrata.selection.wording import parts_of

PAGE = Path(__file__).parent.parent / "docs" / "selection.md"
START, END = "<!-- methods:start -->\n", "<!-- methods:end -->\n"


def row(method: Method) -> str:
    """One line."""
    paper = (
        f"[{method.title}](https://arxiv.org/abs/{method.paper})" if method.paper else method.title
    )
    score, budget, aggregation = parts_of(method)
    return f"| `{method.name}` | {paper} | {score} | {budget} | {aggregation} | {method.differs} |"


def tables() -> str:
    """Both, with a blank line between everything."""
    lines = [
        "| name | method | score | budget | brought together | differs from its paper |",
        "|---|---|---|---|---|---|",
        *map(row, METHODS.values()),
        "",
        "What no row composes, and why:",
        "",
        "| method | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in NOT_COMPOSED.items()),
    ]
    return "\n" + "\n".join(lines) + "\n\n"


def page(text: str) -> str:
    """The page with its tables made new."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + tables() + END + after


def main() -> None:
    """Write the tables, or with ``--check`` fail if they are not what the code says."""
    text = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(text), encoding="utf-8")
    elif page(text) != text:
        sys.exit(f"{PAGE.name} is stale: run scripts/generate_methods.py")


if __name__ == "__main__":
    main()
