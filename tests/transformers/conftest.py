"""Tests on real transformers: the mark, the visible skip, the quiet surroundings, the models."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.plain import Texts
from tests.support.products import make_products_fast

from kvstrata.testing import models

if TYPE_CHECKING:
    from tests.transformers.place import Place

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_HERE = Path(__file__).parent
_INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
collect_ignore_glob = [] if _INSTALLED else ["test_*.py"]

if _INSTALLED:
    import torch

    # Threads that wait for each other lose more than they gain where tests share the cores.
    torch.set_num_threads(1)
    make_products_fast()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs torch and models."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let other libraries warn; a warning out of our own code stays an error."""
    warnings.filterwarnings("default", module=r"(?!kvstrata|tests)")
    warnings.simplefilter("default", ResourceWarning)


@pytest.fixture(scope="session")
def tokenizer() -> models.Tokenizer:
    """SmolLM2's, which is every tiny model's too."""
    from transformers import AutoTokenizer

    tokenizer: models.Tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    return tokenizer


@pytest.fixture
def texts(tokenizer: models.Tokenizer, request: pytest.FixtureRequest) -> Texts:
    """Documents of real text that no other test asks about."""
    return Texts(tokenizer, request.node.nodeid)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A node that the tests of a file share."""
    from tests.transformers.place import Place

    with Place() as place:
        yield place


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    """The same, whose laws hold afterwards; what a test attached there is detached."""
    yield shared
    shared.detach()
    shared.check()


@pytest.fixture
def own() -> Iterator[Any]:
    """A node of the test's own, to be killed, stopped or restarted."""
    from tests.transformers.place import Place

    with Place() as place:
        yield place
