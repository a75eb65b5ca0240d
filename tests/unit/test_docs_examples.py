"""What the pages show runs: their marked Python blocks, and the configurations that they name.

A block under a line ``<!-- runnable -->`` is run as it stands. Every JSON for vLLM and every TOML
file is read by the same parser that reads a user's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import Config, load_config
from kvstrata.config.files import read_file

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/vllm.md",
    "docs/encryption.md",
    "docs/redis.md",
    "docs/object-store.md",
    "docs/mooncake.md",
    "docs/peers.md",
    "docs/disaggregation.md",
    "docs/routing.md",
    "docs/hints.md",
    "docs/from-lmcache.md",
    "docs/operating.md",
)

RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRANSFER = re.compile(r"--kv-transfer-config '(\{.*?\})'", re.DOTALL)


def found(pattern: re.Pattern[str]) -> list[Any]:
    """Every match in the pages, named by its page and line."""
    return [
        pytest.param(match[1], id=f"{page}:{text.count(chr(10), 0, match.start()) + 1}")
        for page in PAGES
        for text in [(ROOT / page).read_text(encoding="utf-8")]
        for match in pattern.finditer(text)
    ]


def load(overrides: dict[str, Any]) -> Config:
    """As an engine reads it, on a machine that is large enough for any example."""
    return load_config(
        environ={}, overrides=overrides, memory_bytes=1 << 50, disk_bytes=lambda _: 1 << 50
    )


@pytest.fixture(autouse=True)
def _own_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_the_pages_have_examples() -> None:
    assert found(RUNNABLE)
    assert len(found(TOML)) >= 2
    assert len(found(TRANSFER)) >= 2


@pytest.mark.parametrize("source", found(RUNNABLE))
def test_runnable_blocks_run(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "example", "exec"), {"__name__": "example"})
    said = capsys.readouterr().out.strip()
    assert said == "2 of 2 chunks came back" or f"# {said}\n" in source


@pytest.mark.parametrize("text", found(TOML))
def test_configuration_files_load(text: str, tmp_path: Path) -> None:
    file = tmp_path / "kvstrata.toml"
    file.write_text(text, encoding="utf-8")
    assert load(dict(read_file(file))).sources


@pytest.mark.parametrize("text", found(TRANSFER))
def test_options_for_vllm_load(text: str) -> None:
    options = json.loads(text)
    assert options.pop("kv_connector") == "KVStrataConnector"
    assert options.pop("kv_connector_module_path") == "kvstrata.connectors.vllm"
    assert options.pop("kv_role") == "kv_both"
    assert options.pop("kv_load_failure_policy") == "recompute"
    extra = options.pop("kv_connector_extra_config", {})
    assert not options
    assert len(load(extra).sources) == len(extra)
