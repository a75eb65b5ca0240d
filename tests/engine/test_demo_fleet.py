"""The fleet's demo from end to end, with a model that is small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstrata.cli.demo_fleet import STORE, WAYS, Fleet, FleetDemo
from kvstrata.cli.demo_results import Asked
from kvstrata.errors import UsageError

pytestmark = pytest.mark.engine


@pytest.mark.dear
def test_one_document_by_every_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubted(FleetDemo):
        """Looks once more where the last answer came from, and expects it from elsewhere."""

        def _tell(self, fleet: Fleet, asked: Asked, prompt: Sequence[int]) -> None:
            super()._tell(fleet, asked, prompt)
            fleet.forget()
            monkeypatch.setitem(WAYS, "apart", STORE)
            said = "document 1, apart: 17 chunks from peer, not 17 chunks from object_store"
            with pytest.raises(UsageError, match=said):
                self._answer("apart", fleet.second, fleet.proxy, asked, prompt)

    monkeypatch.setattr("kvstrata.testing.models.smollm2", lambda: tiny_llama)
    demo = Doubted(tmp_path, (2,))
    demo.run()
    (asked,) = demo.asked
    assert asked.prompt_tokens == 2 * 1024 + 1
    assert list(asked.tokens) == list(WAYS)
    assert asked.same
    assert all(asked.ms(way) > 0 for way in WAYS)
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
