"""Every benchmark in turn, each in a process of its own, and one table of what they found.

``make bench`` runs this. The exit status is 0 even where a row falls short, which the table marks;
it is 1 where a benchmark failed or an output was wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Options,
    Row,
    add_arguments,
    machine,
    options_of,
    say,
    table,
    write_json,
)

Runner = Callable[[Options], list[Row]]


class Failed(Exception):
    """A benchmark did not come to its end."""


def ours(name: str) -> Runner:
    """A benchmark of the common form."""

    def run(options: Options) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "rows.json"
            arguments = [f"--seed={options.seed}", f"--folder={options.folder}"]
            arguments += ["--quick"] if options.quick else []
            arguments += ["--allow-tmpfs"] if options.allow_tmpfs else []
            _run(f"benchmarks.{name}.run", *arguments, f"--json={results}", echo=True)
            return [Row.from_dict(row) for row in json.loads(results.read_text())["rows"]]

    return run


def disk(options: Options) -> list[Row]:
    """The disk tier beside raw O_DIRECT, by the size of the objects."""
    arguments = [f"--seed={options.seed}", f"--folder={options.folder}"]
    arguments += ["--rounds=4", "--megabytes=64"] if options.quick else []
    arguments += ["--allow-tmpfs"] if options.allow_tmpfs else []
    options.folder.mkdir(parents=True, exist_ok=True)
    # Its exit status says whether the ratio is reached, which the rows say too.
    found = json.loads(_run("benchmarks.disk.run", *arguments, "--json", may_end_with=(0, 1)))
    rows = []
    for size, result in found["results"].items():
        for verb in ("write", "read"):
            speeds = [result[f"{verb} {side}"] / 1e9 for side in ("tier", "raw")]
            rows.append(
                Row(
                    "disk",
                    f"disk tier {verb} / raw O_DIRECT, objects of {size} (speed)",
                    result[f"{verb} ratio"],
                    found["required"],
                    at_most=False,
                    detail=f"IQR {result[f'{verb} low']:.3f} to {result[f'{verb} high']:.3f}; "
                    f"{speeds[0]:.2f} of {speeds[1]:.2f} GB/s, "
                    f"{found['ran_on']['threads']} threads, {found['ran_on']['file_system']}",
                )
            )
    return rows


def node(options: Options) -> list[Row]:
    """The node's answers and its memory."""
    output = _run("benchmarks.node.run", *(["--quick"] if options.quick else []))
    return node_rows(output)


def node_rows(output: str) -> list[Row]:
    """Rows of lines such as ``match | median 0.90 ms, p99 1.31 ms | median <= 2 ms, p99 <= 5 ms``.

    A line with two bounds is two rows; a line without one is for information.
    """
    rows = []
    for line in output.splitlines():
        what, *rest = (part.strip() for part in line.split(" | "))
        if len(rest) != 2 or rest[0] == "measured":
            continue
        measured, bounds = rest
        values = re.findall(r"([a-z][a-z0-9]*) ([\d.]+) (\w+)", measured) or [
            ("", *found) for found in re.findall(r"^([\d.]+) (\S+)", measured)
        ]
        wanted = re.findall(r"(?:([a-z][a-z0-9]*) )?<= ([\d.]+)", bounds)
        for name, bound in wanted or [("", "")]:
            found = [value for value in values if not name or value[0] == name]
            if not found:
                raise Failed(f"benchmarks.node.run: no figure for {name!r} in {line!r}")
            _, value, unit = found[0]
            named = f"{what}, {name}" if name else what
            limit = float(bound) if bound else None
            detail = "" if measured == f"{value} {unit}" else measured
            rows.append(Row("node", named, float(value), limit, unit=unit, detail=detail))
    if not rows:
        raise Failed("benchmarks.node.run printed no rows")
    return rows


BENCHMARKS: Mapping[str, Runner] = {
    "long_document_qa": ours("long_document_qa"),
    "inside": ours("inside"),
    "under_load": ours("under_load"),
    "lmcache_client": ours("lmcache_client"),
    "encoded_disk": ours("encoded_disk"),
    "streaming": ours("streaming"),
    "planner": ours("planner"),
    "meeting": ours("meeting"),
    "blend": ours("blend"),
    "stores": ours("stores"),
    "codecs": ours("codecs"),
    "cold_overhead": ours("cold_overhead"),
    "hybrid": ours("hybrid"),
    "transformers_turns": ours("transformers_turns"),
    "overhead": ours("overhead"),
    "concurrent": ours("concurrent"),
    "disaggregated": ours("disaggregated"),
    "copies": ours("copies"),
    "sglang_pages": ours("sglang_pages"),
    "fleet": ours("fleet"),
    "peers": ours("peers"),
    "routing": ours("routing"),
    "fleet_lookup": ours("fleet_lookup"),
    "events": ours("events"),
    "tenants": ours("tenants"),
    "disk": disk,
    "encryption": ours("encryption"),
    "node": node,
    "api": ours("api"),
}
"""Every benchmark that needs no input from outside, by its folder."""


def _run(
    module: str, *arguments: str, echo: bool = False, may_end_with: tuple[int, ...] = (0,)
) -> str:
    """Run a module as a program; its output, or `Failed` with what it said last."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    lines: list[str] = []
    errors = _Collector(process.stderr)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line)
            if echo:
                say("    " + line.rstrip())
        status = process.wait()
    finally:
        process.terminate()  # it cleans up after itself
        process.wait()
    if status not in may_end_with:
        raise Failed(f"{module} ended with status {status}: {errors.last_words()}")
    return "".join(lines)


class _Collector:
    """Reads a pipe to its end in the background."""

    def __init__(self, pipe: Any) -> None:
        self._lines: list[str] = []
        self._thread = threading.Thread(target=lambda: self._lines.extend(pipe), daemon=True)
        self._thread.start()

    def last_words(self, count: int = 15) -> str:
        """The last lines."""
        self._thread.join(5.0)
        return "\n".join(["", *(line.rstrip() for line in self._lines[-count:])])


def run_all(names: list[str], options: Options) -> tuple[list[Row], dict[str, float], list[str]]:
    """Rows, seconds by benchmark, and what failed."""
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    failures: list[str] = []
    for name in names:
        say(f"{name} ...")
        began = time.monotonic()
        try:
            rows += BENCHMARKS[name](options)
        except Failed as error:
            failures.append(name)
            say(f"{name} FAILED: {error}")
        seconds[name] = round(time.monotonic() - began, 1)
    return rows, seconds, failures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--only",
        action="append",
        choices=sorted(BENCHMARKS),
        metavar="NAME",
        help=f"run only this one; may be repeated: {', '.join(BENCHMARKS)}",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = options_of(arguments)
    about = machine(options.folder)
    if options.quick:
        about["quick"] = True
    about["seed"] = options.seed
    say("\n".join(f"{name:>24}  {value}" for name, value in about.items()))
    if about["load_before"] > 0.5:
        say("NOTE: this machine is busy with something else; ratios of times will be noisy")
    rows, seconds, failures = run_all(arguments.only or list(BENCHMARKS), options)
    about["seconds"] = seconds
    say("\n" + table(rows))
    short = [row for row in rows if row.ok is False]
    judged = sum(row.ok is not None for row in rows)
    say(f"\n{judged - len(short)} of {judged} rows reach what they must"
        + (f"; failed: {', '.join(failures)}" if failures else ""))  # fmt: skip
    if arguments.json:
        write_json(arguments.json, about, rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
