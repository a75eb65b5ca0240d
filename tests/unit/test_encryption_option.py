"""The option `encryption`, from its value to the bytes on disk."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tests.support.nodes import (
    chunk_keys,
    flush,
    until,
)
from tests.support.sealed import (
    KEY,
    NUM,
    OTHER,
    Test,
    files,
    get,
    put,
)

from kvstrata.config import load_config
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import decode
from kvstrata.tiers.memory import MemoryTier
from kvstrata.wire import protocol as p


class TestConfigured:
    """From the option to the bytes."""

    def config(self, tmp_path: Path, source: str) -> Any:
        return load_config(
            environ={},
            overrides={
                "host.capacity": "1MiB",
                "disk": {
                    "path": str(tmp_path / "disk"), "capacity": "8MiB", "codec": "raw",
                    "encryption": source,
                },
            },
        )  # fmt: skip

    def run(self, config: Any, test: Test) -> None:
        async def main() -> None:
            node = Node.create(config)
            await node.start()
            try:
                await test(node)
            finally:
                await node.stop(drain_s=1.0)

        asyncio.run(main())

    def test_a_file_of_keys(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        keys = chunk_keys(NUM)
        file = tmp_path / "keys"
        file.touch(mode=0o600)
        file.write_text(f"{KEY.hex()}\n{OTHER.hex()}\n")

        async def test(node: Node) -> None:
            await until(lambda: node.backings[0].state == "ok")
            put(node, keys)
            await flush(node, Client("pid 1"))
            assert await get(node, keys) == NUM
            answer = str(node.status(Client("pid 1"), p.Status(1)))
            assert KEY.hex() not in answer

        with caplog.at_level(logging.DEBUG):
            self.run(self.config(tmp_path, f"file:{file}"), test)
        name = KeyRing([KEY]).ids[0]
        assert {decode(one.read_bytes()).encryption_key for one in files(tmp_path / "disk")} == {
            name
        }
        assert f"encrypted with the key {name.hex()}; keys that open: 2" in caplog.text
        assert KEY.hex() not in caplog.text

    def test_without_its_keys_a_tier_is_left_out(self, tmp_path: Path) -> None:
        before = set(os.listdir("/proc/self/fd"))

        async def test(node: Node) -> None:
            assert node.backings == []
            assert "disk.encryption" in node.left_out["disk"]
            assert "no variable NOT_THERE" in node.left_out["disk"]
            assert node.counters.snapshot()['tiers_left_out_total{tier="disk"}'] == 1

        self.run(self.config(tmp_path, "env:NOT_THERE"), test)
        assert not (tmp_path / "disk").exists(), "nothing was opened"
        assert set(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize(
        "library",
        [None, types.SimpleNamespace(AESGCM=object)],
        ids=["missing", "older"],
    )
    def test_without_the_library(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object
    ) -> None:
        module = "cryptography.hazmat.primitives.ciphers.aead"
        monkeypatch.setitem(sys.modules, module, library)
        monkeypatch.delitem(sys.modules, "kvstrata.node.coding.sealing")

        async def test(node: Node) -> None:
            assert "pip install 'kvstrata[encryption]'" in node.left_out["disk"]

        self.run(self.config(tmp_path, "env:NOT_THERE"), test)

    def test_a_node_without_encryption_does_not_import_it(self) -> None:
        import subprocess

        code = (
            "import sys, kvstrata.node.node, kvstrata.node.opening, kvstrata.cli;"
            "sys.exit('cryptography' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_memory_tier_has_no_encryption() -> None:
    """Encrypting what lies beside its key in one process would protect nobody."""
    from kvstrata.config import MemoryConfig

    assert MemoryConfig(capacity=1 << 20).encryption == "none"
    assert isinstance(MemoryConfig(capacity=1 << 20).open(None), MemoryTier)
