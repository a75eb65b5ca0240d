"""Fail on a circle of imports, and on one that runs up the house (docs/design.md).

Every import counts: of a type checker alone, and inside a function too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "src"

STOREYS = (
    "errors",
    "units tables layout header objects brought producers parts secret keys pagekeys heads "
    "identity cores descriptors canaries",
    "observe",
    "memory",
    "codecs blend",
    "selection",
    "policies",
    "routing",
    "transfer",
    "tiers",
    "quality",
    "config",
    "wire",
    "fleet",
    "node.common",
    "node.slots",
    "node.coding",
    "node.service",
    "node.operating",
    "node",
    "node.fleet",
    "node.process",
    "connectors",
    "proxy",
    "control",
    "testing",
    "cli",
)
"""From the ground up. A module imports from its own storey and those below."""


def modules(sources: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted(sources.rglob("*.py")):
        words = list(file.relative_to(sources).with_suffix("").parts)
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The package's own modules that a file imports, and in which line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in known)


def storey(module: str) -> int:
    """Number of the storey that a module is in."""
    place = module.partition(".")[2]
    rooms = [
        (len(room), number)
        for number, line in enumerate(STOREYS)
        for room in line.split()
        if place == room or place.startswith(f"{room}.")
    ]
    if not rooms:
        raise SystemExit(f"{module} is in no room: name its storey in {__file__}")
    return max(rooms)[1]


def main() -> int:
    known = modules(SOURCES)
    graph: dict[str, set[str]] = {module: set() for module in known}
    problems = []
    for module, file in known.items():
        for name, line in imports(file, known):
            if name in (module, "kvstrata"):
                continue
            graph[module].add(name)
            mine, theirs = storey(module), storey(name)
            if mine < theirs:
                problems.append(f"{file}:{line}: {module} imports {name}, which is not below it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append("a circle: " + " <- ".join(error.args[1]))
    print("\n".join(problems) or f"{len(known)} modules, no circle, no import that runs up")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
