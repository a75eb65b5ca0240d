"""What cannot be identified by the model's folder has no namespace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstrata.connectors.sglang.fingerprint import from_elsewhere


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_format": "remote_instance"},
        {"load_format": "flash_rl"},
        {"weight_cache_mode": "client"},
        {"forward_hooks": [{"name": "steer"}]},
        {"kt_weight_path": "/experts"},
        {"modelopt_checkpoint_restore_path": "/quantized"},
    ],
)
def test_weights_and_code_from_elsewhere(arguments: dict[str, Any]) -> None:
    plain = {"load_format": "auto", "weight_cache_mode": "daemon", "forward_hooks": None}
    assert not from_elsewhere(SimpleNamespace(**plain))
    (name,) = arguments
    assert f"--{name.replace('_', '-')}" in from_elsewhere(SimpleNamespace(**plain | arguments))
