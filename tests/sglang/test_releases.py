"""Weights that an engine gives up with its memory are no longer the checkpoint's.

SGLang really gives memory back on a GPU only, so here its hook alone is called.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvstrata.connectors.sglang import plugin
from kvstrata.connectors.sglang.renewals import Generation


@pytest.mark.parametrize(
    ("tags", "saver", "copied", "lost"),
    [
        (None, True, False, True),
        (["weights"], True, False, True),
        (["kv_cache", "weights"], True, False, True),
        (["kv_cache"], True, False, False),
        (None, False, False, False),
        (None, True, True, False),
    ],
)
def test_weights_without_a_copy_are_lost(
    tags: list[str] | None,
    saver: bool,
    copied: bool,
    lost: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt import runtime_context

    generation = Generation()
    arguments = SimpleNamespace(enable_weights_cpu_backup=copied)
    monkeypatch.setattr(plugin, "OF_THIS_PROCESS", generation)
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: arguments)
    updater = SimpleNamespace(memory_saver_adapter=SimpleNamespace(enabled=saver))
    seen = []

    def release(updater: object, request: object) -> str:
        seen.append(generation.storable())
        generation.flushed()  # SGLang does, if its KV goes as well
        return "released"

    request = SimpleNamespace(tags=tags)
    assert plugin._around_release(release, updater, request) == "released"
    assert seen == ([None] if lost else [""]), "before anything is gone"
    assert bool(generation.storable()) == lost
