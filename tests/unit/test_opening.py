"""A tier that cannot be opened is left out, whatever the reason, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import load_config
from kvstrata.node import opening
from kvstrata.node.node import Node
from kvstrata.tiers.disk.tier import DiskTier


def broken(error: Exception) -> Callable[..., Any]:
    def warm_up(codec: object) -> None:
        raise error

    return warm_up


@pytest.mark.bugs
@pytest.mark.parametrize(
    ("error", "why", "bug"),
    [
        (ImportError("numba is broken"), "codec fp8 does not work here: numba is broken", False),
        (RuntimeError("no locator"), "codec fp8 does not work here: no locator", False),
        (TypeError("what is this"), "what is this", True),
    ],
)
@pytest.mark.parametrize("option", ["codec", "coarser"])
def test_a_codec_that_cannot_work_leaves_its_tier_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    why: str,
    bug: bool,
    option: str,
) -> None:
    monkeypatch.setattr(opening, "warm_up", broken(error))
    config = load_config(
        environ={},
        overrides={
            "host.capacity": "1MiB",
            "memory": {"capacity": "1MiB", "codec": "raw"},
            "disk": {
                "path": str(tmp_path / "disk"),
                "capacity": "8MiB",
                "load_target": "1s",
                "codec": "raw",
                option: "fp8",
            },
        },
    )
    before = set(os.listdir("/proc/self/fd"))

    async def main() -> None:
        node = Node.create(config)
        await node.start()
        assert [backing.name for backing in node.backings] == ["memory"], "the others serve"
        assert why in node.left_out["disk"]
        counted = node.counters.snapshot()
        assert counted['tiers_left_out_total{tier="disk"}'] == 1
        assert ('bugs_total{where="opening disk"}' in counted) is bug
        DiskTier(tmp_path / "disk").close()  # nobody holds its folder
        await node.stop()

    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_calibration_that_is_missing_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    """It is seen when the configuration is read, before there is a node."""
    from kvstrata.errors import ConfigError

    with pytest.raises(ConfigError, match=r"disk\.codec"):
        load_config(
            environ={},
            overrides={
                "disk": {"path": str(tmp_path), "capacity": "8MiB", "codec": "kvtc-nowhere"}
            },
        )


def test_a_node_that_cannot_be_made_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("kvstrata.node.node.open_backings", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryError):
        Node.create(load_config(environ={}, overrides={"host.capacity": "1MiB"}))
    assert set(os.listdir("/proc/self/fd")) == before
