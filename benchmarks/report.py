"""Writes the results of a run into ``docs/benchmarks.md``, so that no figure is typed by hand.

python -m benchmarks --json build/results.json
python -m benchmarks.report build/results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Row, table

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def render(results: Mapping[str, Any]) -> str:
    """The section between the markers: the machine, then the table."""
    machine = dict(results["machine"])
    seconds = machine.pop("seconds", {})
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in machine.items()]
    total = f"- duration: {sum(seconds.values()) / 60:.0f} min" if seconds else ""
    rows = [Row.from_dict(row) for row in results["rows"]]
    command = "Made by `make bench`" + (" with `--quick`" if machine.get("quick") else "") + " on:"
    return "\n".join([command, "", *facts, *filter(None, [total]), "", table(rows, markdown=True)])


def insert(page: str, section: str) -> str:
    """The page with this section between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in after or END in after:
        raise ValueError(f"the page must have {START} and {END} once each, in this order")
    return f"{before}{START}\n\n{section}\n\n{END}{after}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what `python -m benchmarks --json` wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    section = render(json.loads(arguments.results.read_text()))
    arguments.page.write_text(insert(arguments.page.read_text(), section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
