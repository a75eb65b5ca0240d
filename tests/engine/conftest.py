"""Tests on a real vLLM: the mark, the visible skip, the quiet surroundings and the models."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import pytest
from tests.engine.engine import Prompt
from tests.engine.plain import LENGTHS, Plain, Texts
from tests.engine.shared import Engines, Shared
from tests.support import products

from kvstrata.testing import models

# vLLM reads these when it is imported, in this process and in those that it starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_HERE = Path(__file__).parent
ALL = os.environ.get("KVSTRATA_TEST_ALL") == "1"
DEAR = "takes minutes without AVX-512; KVSTRATA_TEST_ALL=1 runs it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder; without vLLM it is skipped and says so."""
    installed = importlib.util.find_spec("vllm") is not None
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if not installed:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
            elif item.get_closest_marker("dear") and not products.ARE_FAST and not ALL:
                item.add_marker(pytest.mark.skip(reason=DEAR))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let other libraries warn; a warning out of our own code stays an error.

    pytest restores the filters after each test.
    """
    warnings.filterwarnings("default", module=r"(?!kvstrata|tests)")
    # Raised wherever the collector happens to run, about sockets that are not ours.
    warnings.simplefilter("default", ResourceWarning)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16."""
    return models.smollm2()


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Folder of Gemma 3 270M in bfloat16: sliding-window and full attention."""
    return models.gemma3()


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Folder of the random Llama that two tensor-parallel ranks can share."""
    return models.tiny_llama()


@pytest.fixture(scope="session")
def tiny_idefics3() -> Path:
    """Folder of the random Idefics 3, which looks at images."""
    return models.tiny_idefics3()


_ENGINES = Engines()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Shared engines end with the last test of this folder, and some of them with their file.

    A folder that is no package has no fixtures of its own: they would live as long as the session.
    """
    if nextitem is None or _HERE not in nextitem.path.parents:
        _ENGINES.close()
    elif nextitem.path != item.path:
        _ENGINES.leave_file()


@pytest.fixture(scope="session")
def engines() -> Engines:
    """The engines that tests share; they end with the last test of this folder."""
    return _ENGINES


@pytest.fixture(scope="session")
def plain(engines: Engines, tiny_llama: Path) -> Plain:
    """Plain vLLM with the tiny Llama: what most answers are compared with."""
    return engines.plain(tiny_llama, keep=True)


@pytest.fixture(scope="session")
def shared(engines: Engines, tiny_llama: Path) -> Shared:
    """The engine that most tests use: the tiny Llama with KVStrata."""
    return engines.shared(tiny_llama)


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> models.Tokenizer:
    """SmolLM2's, which is the tiny Llama's too."""
    from transformers import AutoTokenizer

    tokenizer: models.Tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer


@pytest.fixture
def texts(tokenizer: models.Tokenizer, request: pytest.FixtureRequest) -> Texts:
    """Documents of real text that no other test asks about."""
    return Texts(tokenizer, request.node.nodeid)


@pytest.fixture
def prompts(texts: Texts) -> list[Prompt]:
    """Documents of every length; a whole chunk hits in 31 of them."""
    return texts.of(*LENGTHS)
