"""What holds for every unit test: how long work holds the loop is no matter of the clock."""

from __future__ import annotations

import pytest

from kvstrata.node.common import slices


@pytest.fixture(autouse=True)
def long_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked is answered at once, however slow the machine is."""
    monkeypatch.setattr(slices, "HOLD_S", 60.0)
