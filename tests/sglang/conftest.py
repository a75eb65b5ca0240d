"""Tests on a real SGLang: the mark, the visible skip, the quiet surroundings, the stand-ins for
what its packages lack on a CPU, the models and the servers that tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.plain import Texts
from tests.sglang.children import ENVIRONMENT, HICACHE, SHIMS, Server

from kvstrata.testing import models

_HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("sglang") is not None

if INSTALLED:
    # SGLang reads these when it is imported, by the tests of its own kit in this process.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.path.append(str(SHIMS))
    from cpu_stand_ins import install

    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder; without SGLang it is skipped and says so."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let other libraries warn; a warning out of our own code stays an error.

    pytest restores the filters after each test.
    """
    warnings.filterwarnings("default", module=r"(?!kvstrata|tests)")
    # Raised wherever the collector happens to run, about sockets that are not ours.
    warnings.simplefilter("default", ResourceWarning)


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Folder of the random Llama that most tests take."""
    return models.tiny_llama()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16."""
    return models.smollm2()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> models.Tokenizer:
    """SmolLM2's, which is the tiny models' too."""
    from transformers import AutoTokenizer

    tokenizer: models.Tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer


@pytest.fixture
def texts(tokenizer: models.Tokenizer, request: pytest.FixtureRequest) -> Texts:
    """Documents of real text that no other test asks about."""
    return Texts(tokenizer, request.node.nodeid)


@pytest.fixture(scope="session")
def plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Plain SGLang with the tiny Llama, its cache in its own memory: what answers are compared
    with. ``flush`` it for a cold one; it serves many files, so leave it its weights."""
    server = Server(tiny_llama, tmp_path_factory.mktemp("plain") / "sglang.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def stored_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which `with_files` keeps a file for each page."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def with_files(
    tiny_llama: Path, stored_pages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """SGLang with its own storage in files behind its cache, and nothing of ours."""
    server = Server(
        tiny_llama,
        tmp_path_factory.mktemp("files") / "sglang.log",
        {**HICACHE, "hicache-storage-backend": "file"},
        {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(stored_pages)},
    )
    yield server
    server.kill()
