"""SGLang's demo from end to end, with a model that is small enough for a test."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.sglang.children import launch, surroundings
from tests.support.forked import Forked, fork_server

from kvstrata.cli.demo_results import WAYS
from kvstrata.cli.demo_sglang import SGLangDemo
from kvstrata.testing.sglang import SGLang

PROGRAM = ["-m", "sglang.launch_server"]


class _Process(Forked):
    """Forked, and looked at as `kvstrata.testing.serving.Program` looks at its own."""

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None


class _Quick(SGLang):
    """The first that is started is the program as it is, those after it are forked."""

    started = 0

    def start(self) -> None:
        _Quick.started += 1
        if _Quick.started == 1:
            super().start()
            return
        assert self._command[1:3] == PROGRAM
        server = fork_server("tests.sglang.preload", surroundings)
        forked: Any = _Process(launch, (self._command[3:],), self._log, self._environment, server)
        self._process = forked


def test_one_document_by_every_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.testing.models.smollm2", lambda: tiny_llama)
    monkeypatch.setattr("kvstrata.testing.sglang.SGLang", _Quick)
    monkeypatch.setattr(_Quick, "started", 0)
    demo = SGLangDemo(tmp_path, (1,))
    demo.run()  # it raises where a hit comes from elsewhere than it is said to
    assert _Quick.started == 2, "before and after everything has ended"
    (asked,) = demo.asked
    assert asked.prompt_tokens == 1024 + 16
    assert list(asked.tokens) == list(WAYS)
    assert asked.same
    assert all(asked.ms(way) > 0 for way in WAYS)
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
