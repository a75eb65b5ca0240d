"""The dashboard before a real engine: where its tokens came from, and why the rest did not."""

from __future__ import annotations

import contextlib
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from tests.engine.engine import Engine
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.shared import SETTINGS
from tests.support.browsers import CHROMIUM, LOOK_MS, Look, chromium

from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.workplace import wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_a_real_engines_requests(tiny_llama: Path, plain: Plain, texts: Texts) -> None:
    prompts = texts.of(300, 700, 1100)
    expect.set_options(timeout=LOOK_MS)
    url = f"{HOST}:{free_port()}"
    with Place(tiny_llama, {**SETTINGS, "api.listen": url}) as place, chromium() as browser:
        place.set("node", f"unix:{place.folder}/node.sock")
        place.use_disk()
        place._serve()
        wait_ready(place.node)
        engine = place.engine()
        eventually(lambda: answers(f"http://{url}/v1/ready"), "the API answers")
        look = Look(browser, f"http://{url}")
        page = look.page
        expect(page.locator("#state")).to_have_text("all is well")
        cold = engine.answers(prompts)
        assert [answer.tokens for answer in cold] == plain.cold(prompts)
        expect(page.locator("#tokens .legend")).to_contain_text("computed: never stored")
        place.await_stored(engine, prompts)
        engine.forget()
        warm = engine.answers(prompts)
        assert [answer.tokens for answer in warm] == plain.warm(prompts)
        expect(page.locator("#tokens .legend")).to_contain_text("from host")
        expect(page.locator("#requests details")).to_have_count(2 * len(prompts))
        loaded = {answer.cached for answer in warm}
        page.locator("#order").select_option("latest")
        shown = page.locator("#requests details summary .good").all_inner_texts()[: len(prompts)]
        assert {int(text.split()[0]) for text in shown} == loaded
        expect(page.locator("#chunks > li")).to_have_count(len(prompts))
        assert not look.wrong
        if folder := os.environ.get("KVSTRATA_PICTURES"):
            take_pictures(browser, f"http://{url}", Path(folder), engine, texts)


def take_pictures(browser: Browser, url: str, folder: Path, engine: Engine, texts: Texts) -> None:
    """Those in the documentation: of a minute in which prompts come again, and new ones."""
    pages = {}
    for name, scheme, width, height in (
        ("dashboard-light", "light", 1000, 1250),
        ("dashboard-dark", "dark", 1000, 1250),
        ("dashboard-phone", "light", 360, 780),
    ):
        viewport: Any = {"width": width, "height": height}
        pages[name] = Look(browser, url, color_scheme=scheme, viewport=viewport).page
    known = texts.of(500, 900, 1300, 1700)
    for turn in range(40):
        engine.forget()
        some = known[turn % 4 :][:2]
        known[turn % 4 :: 4] = texts.of(*[600 + 20 * turn] * len(known[turn % 4 :: 4]))
        engine.answers(some)
        for page in pages.values():
            page.wait_for_timeout(400)
    for name, page in pages.items():
        page.screenshot(path=folder / f"{name}.png")
        page.close()
