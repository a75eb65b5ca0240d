"""The fleet's demo from end to end, with a model that is small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.cli import demo_fleet
from kvstrata.cli.demo_fleet import WAYS, FleetDemo
from kvstrata.errors import UsageError

pytestmark = pytest.mark.engine


def test_one_document_by_every_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.testing.models.smollm2", lambda: tiny_llama)
    demo = FleetDemo(tmp_path, (2,))
    demo.run()
    (asked,) = demo.asked
    assert asked.prompt_tokens == 2 * 1024 + 1
    assert list(asked.tokens) == list(WAYS)
    assert asked.same
    assert all(asked.ms(way) > 0 for way in WAYS)
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
    # It looks where the chunks came from, and does not take one tier for another.
    monkeypatch.setitem(demo_fleet.WAYS, "apart", "object_store")
    with pytest.raises(UsageError, match="document 1, apart: 17 chunks from peer, not 17 chunks f"):
        FleetDemo(tmp_path, (2,)).run()
