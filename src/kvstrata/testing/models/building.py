"""Folders that are built once, all of each or nothing, and what building them needs."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstrata.errors import UsageError

_RECIPE = 1
"""Part of each folder's name: raise it whenever a change here changes what is built."""


def cache_folder() -> Path:
    """Folder of the built models: ``KVSTRATA_MODEL_CACHE``, else ``~/.cache/kvstrata/models``."""
    named = os.environ.get("KVSTRATA_MODEL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "kvstrata" / "models"


def built(name: str, folder: Path | None, fill: Callable[[Path], None]) -> Path:
    """The folder, built by ``fill`` unless it is there already: all of it or nothing.

    Two processes at once: one builds, the other waits on the lock and finds it done.

    Args:
        name: of the folder in the cache.
        folder: where to put it; in the cache if None.
        fill: writes the model into an empty folder.
    """
    target = folder or cache_folder() / f"{name}-r{_RECIPE}"
    if _is_filled(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if _is_filled(target):
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            unfinished = Path(scratch) / target.name
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(target)
    return target


def package_file(module: str, pattern: str) -> Path:
    """The one file in an installed package, found without running the package's code.

    Raises:
        UsageError: the package is missing.
    """
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted(Path(location).glob(pattern)):
            return path
    raise _missing(module)


def require(module: str) -> Any:
    """Import a library that only the making of models needs.

    Raises:
        UsageError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module) from error


def _is_filled(folder: Path) -> bool:
    """Whether anything is in it: a caller may name an empty folder to be filled."""
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; it falls with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _missing(module: str) -> UsageError:
    package = module.replace("_", "-")
    return UsageError(f"building this model needs the package {package}: pip install {package}")
