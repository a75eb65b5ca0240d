"""Tests on a real vLLM: the mark, the visible skip, the quiet surroundings and the models."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.engine import LENGTHS, Place, Plain, Prompt, Texts

from kvstrata.testing import models

# vLLM reads these when it is imported, in this process and in those that it starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# With a connector vLLM leaves one core more unused, and another number of threads is another
# rounding: answers are only comparable under one fixed binding.
os.environ.setdefault(
    "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
)

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder; without vLLM it is skipped and says so."""
    installed = importlib.util.find_spec("vllm") is not None
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if not installed:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


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
def texts(smollm2: Path) -> Texts:
    """Prompts of real text in SmolLM2's tokens."""
    return Texts(smollm2)


@pytest.fixture(scope="session")
def prompts(texts: Texts) -> list[Prompt]:
    """The prompts whose plain answers most tests compare with; a whole chunk hits in 31 of them."""
    return texts.of(*LENGTHS)


@pytest.fixture(scope="session")
def plain(smollm2: Path) -> Iterator[Plain]:
    """Plain vLLM with SmolLM2: what every answer is compared with."""
    with Place(smollm2) as place:
        yield Plain(place.engine(with_kvstrata=False))
