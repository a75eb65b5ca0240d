"""Tests of the connector inside vLLM's own scheduler: the mark, the visible skip, one rig each."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.connector.blend_rig import BlendRig
    from tests.connector.rig import Rig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_HERE = Path(__file__).parent
_INSTALLED = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if _INSTALLED else ["test_*.py"]

if _INSTALLED:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vLLM imports warns about itself
        importlib.import_module("tests.connector.rig")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs vLLM's classes, though no engine is started."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let other libraries warn; a warning out of our own code stays an error."""
    warnings.filterwarnings("default", module=r"(?!kvstrata|tests)")
    warnings.simplefilter("default", ResourceWarning)
    warnings.filterwarnings("default", category=DeprecationWarning)


@pytest.fixture
def make_blends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BlendRig]]:
    """Builds rigs whose workers blend."""
    from tests.connector.blend_rig import BlendRig

    _be_at_home_in(tmp_path, monkeypatch)
    made: list[BlendRig] = []

    def make(**options: Any) -> BlendRig:
        made.append(BlendRig(tmp_path / f"rig{len(made)}", **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def make_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Builds rigs; each ends with its laws checked."""
    from tests.connector.rig import Rig

    _be_at_home_in(tmp_path, monkeypatch)
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(tmp_path / f"rig{len(made)}", **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def _be_at_home_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
