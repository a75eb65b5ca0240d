"""A node as a service whose disk is behind a link, and that plans a meeting wherever it can.

Run as ``kvstrata serve`` is, with the same arguments. The link's speed lies in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engine import checked_node

import kvstrata.node.matching as matching
import kvstrata.tiers.disk.tier as disk
from kvstrata.node.common.planner import Meeting
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.throttled import ThrottledTier


def code(speed: Path) -> str:
    """For `Workplace`, as its service.

    Args:
        speed: a file with the link's bytes per second.
    """
    return f"from tests.engine.meeting_node import run; run({str(speed)!r})"


def run(speed: str) -> None:
    """Serve, and check."""
    inner = disk.DiskTier

    class Linked(ThrottledTier):
        def read(self, ids: Sequence[bytes], into: Sequence[memoryview]) -> list[int | Outcome]:
            self.set_rate(float(Path(speed).read_text()))
            return super().read(ids, into)

    def always(tiers: bytes, *_: Any) -> Meeting | None:
        here = next((i for i, tier in enumerate(tiers) if tier), len(tiers))
        return Meeting(here + 1, -1e-9) if len(tiers) - here > 1 else None

    vars(disk)["DiskTier"] = lambda path: Linked(inner(path), 1e9)
    vars(matching)["meeting"] = always
    checked_node.run()
