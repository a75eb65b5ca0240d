"""Read a configuration file, TOML or YAML, into plain mappings; strict about what is ambiguous."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kvstrata.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently take the last, as TOML does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_file(file: Path) -> Mapping[Any, Any]:
    """What the file says, unchecked; its ending (.toml, .yaml, .yml) names the format.

    Raises:
        ConfigError: it cannot be read or parsed; the path in the error is the file's.
    """
    if file.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(str(file), "expected a file that ends in .toml, .yaml or .yml")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".toml":
            content: Any = _toml().loads(text)
        else:
            content = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds no objects
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(str(file), f"is no valid {file.suffix[1:]}: {_problem(error)}") from None
    if content is None:  # an empty YAML document
        return {}
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ConfigError(str(file), f"holds a {kind}, expected keys and values")
    return content


def _problem(error: Exception) -> str:
    """What is wrong and where, without the line itself: it may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        return importlib.import_module("tomli")
