"""Models other than a Llama that SGLang runs on a CPU: windows of attention beside full ones."""

from __future__ import annotations

import pytest
from tests.engine.plain import Texts
from tests.sglang.place import Place, await_stored, pages

from kvstrata.testing import models


@pytest.mark.parametrize("name", ["tiny_gemma3"])
def test_every_whole_page_comes_back(name: str, texts: Texts) -> None:
    prompts = texts.of(300, 1000, 1500)
    with Place(models.TINY[name]()) as place:
        server = place.server()
        server.wait()
        with await_stored(place.node, sum(pages(len(prompt) + 8) for prompt in prompts)):
            first = [server.ask(prompt) for prompt in prompts]
        server.flush()
        for prompt, answer in zip(prompts, first, strict=True):
            loaded = server.ask(prompt)
            assert loaded.loaded == loaded.cached == pages(len(prompt))
            assert loaded[:2] == answer[:2]
        assert "Traceback" not in server.said
        place.check()
