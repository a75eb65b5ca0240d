"""Is this tree slower than another one? Both run the same benchmarks in turns.

Every row of a benchmark is a ratio or a figure made in one run; here it is divided by the other
tree's, turn by turn, each tree running its own code with this environment's libraries.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import (
    Options,
    Row,
    add_arguments,
    machine,
    options_of,
    say,
    spread,
    table,
    write_json,
)

NAME = "against"
HERE = Path(__file__).parents[2]
BENCHMARKS = ("long_document_qa",)
TURNS = 8
BOUND = 1.03


def run_tree(tree: Path, name: str, options: Options) -> dict[str, Row]:
    """A benchmark's rows by what they say, as this tree makes them in a quick run.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}.run", "--quick", f"--json={results}"]
        command += [f"--seed={options.seed}", f"--folder={options.folder}"]
        command += ["--allow-tmpfs"] if options.allow_tmpfs else []
        path = os.pathsep.join([str(tree / "src"), str(tree)])
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{name} failed in {tree}: {done.stderr[-2000:]}")
        rows = [Row.from_dict(row) for row in json.loads(results.read_text())["rows"]]
        return {row.what: row for row in rows}


def compared(what: str, new: Sequence[Row], old: Sequence[Row]) -> Row:
    """One row of both trees; above 1 the new one is worse."""
    turns = [a.measured / b.measured for a, b in zip(new, old, strict=True)]
    if not new[0].at_most:
        turns = [1 / ratio for ratio in turns]
    found = spread(turns)
    values = [spread(row.measured for row in rows).median for rows in (new, old)]
    return Row(
        NAME,
        f"{new[0].benchmark}: {what}: new / old, the low end of the 95% interval",
        found.ci_low,
        BOUND,
        detail=f"median {found.median:.3f}; {found}; {values[0]:.3f} and {values[1]:.3f}",
    )


def measure(other: Path, names: Sequence[str], turns: int, options: Options) -> list[Row]:
    """A row for each row that both trees have."""
    rows: list[Row] = []
    for name in names:
        new: list[dict[str, Row]] = []
        old: list[dict[str, Row]] = []
        for number in range(turns):
            sides = [(HERE, new), (other, old)]
            for tree, into in sides if number % 2 else reversed(sides):
                into.append(run_tree(tree, name, options))
            say(f"{name}: turn {number + 1} of {turns}")
        for what, row in new[0].items():
            if all(what in rows_of for rows_of in (*new, *old)) and not math.isnan(row.measured):
                rows.append(compared(what, [r[what] for r in new], [r[what] for r in old]))
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against.run", description=__doc__)
    parser.add_argument("other", type=Path, help="folder of the other tree, a whole checkout")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"instead of {BENCHMARKS}")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each tree (%(default)s)")
    add_arguments(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = options_of(arguments)
    about = machine(options.folder)
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    turns = 2 if options.quick else arguments.turns
    rows = measure(arguments.other.resolve(), arguments.only or BENCHMARKS, turns, options)
    say(table(rows))
    if arguments.json:
        write_json(arguments.json, about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
