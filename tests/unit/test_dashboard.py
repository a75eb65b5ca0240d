"""The dashboard in a real browser, before a real node: what it shows is what the node holds."""

from __future__ import annotations

import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from tests.support.apis import CHUNK, Engine, Rig
from tests.support.browsers import CHROMIUM, LOOK_MS, Look, chromium

from kvstrata.wire.operator import Operator

MARKUP = "<img src=x onerror=document.title=1>"

expect.set_options(timeout=LOOK_MS)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        started = Rig(Path(folder))
        try:
            yield started
        finally:
            started.close()


def fill(engine: Engine) -> list[bytes]:
    engine.tell()
    keys = engine.store(list(range(4 * CHUNK)))
    engine.client.record({
        "request": f"cmpl-{MARKUP}", "outcome": "stopped", "prompt_tokens": 70, "local_tokens": 0,
        "loaded_tokens": 48, "tier_tokens": {"host": 48}, "load_s": 0.25, "seconds": 1.5,
        "reasons": [{"why": "evicted", "tokens": 22, "tier": "host", "ago_s": 3.0}],
    })  # fmt: skip
    return keys


@pytest.mark.parametrize(
    "options",
    [
        {"color_scheme": "light", "viewport": {"width": 1200, "height": 900}},
        {"color_scheme": "dark", "viewport": {"width": 1200, "height": 900}},
        {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
    ],
    ids=["light", "dark", "phone"],
)
def test_what_it_shows(browser: Browser, rig: Rig, options: dict[str, Any]) -> None:
    with rig.engine() as engine:
        fill(engine)
    look = Look(browser, rig.url, **options)
    page = look.page
    expect(page.locator("#state")).to_have_text("all is well")
    expect(page.locator("#tiers tbody tr")).to_have_count(2)
    expect(page.locator("#chunks > li")).to_have_count(1)
    expect(page.locator("#chunks > li")).to_contain_text("512 tokens from 0")
    request = page.locator("#requests details")
    expect(request).to_contain_text(MARKUP)
    request.locator("summary").click()
    expect(request.locator(".reasons")).to_contain_text("22 tokens: evicted, host, 3.0 s before")
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "it has to be scrolled sideways"
    found = Axe().run(page)
    violations = found.response["violations"]
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    assert not serious, found.generate_report()
    assert page.title() == "KVStrata"
    assert not look.wrong
    page.close()


def test_what_clients_say_is_text_whatever_it_is(browser: Browser, rig: Rig) -> None:
    with rig.engine() as engine:
        engine.tell(name=MARKUP)
        keys = engine.store(list(range(2 * CHUNK)))
        owner = bytes.fromhex(engine.owner_of(keys[0]))
        Operator(engine.client).pin(keys, owner, MARKUP, 60.0)
        engine.client.record({
            "request": MARKUP, "outcome": MARKUP, "prompt_tokens": MARKUP, "load_s": [MARKUP],
            "loaded_tokens": float("nan"), "local_tokens": {MARKUP: MARKUP}, MARKUP: None,
            "reasons": [{"why": "capped", "tokens": 3, "tier": MARKUP, "detail": MARKUP}],
        })  # fmt: skip
    look = Look(browser, rig.url)
    page = look.page
    expect(page.locator("#pins code")).to_have_text(MARKUP)
    expect(page.locator("#requests summary")).to_contain_text(MARKUP)
    expect(page.locator("#state")).to_have_text("all is well")
    page.locator("#requests summary").click()
    expect(page.locator("#requests .reasons")).to_contain_text(MARKUP)
    page.locator("#order").select_option("slowest")
    assert page.locator("img").count() == 0
    assert page.title() == "KVStrata"
    assert not look.wrong
    page.close()


def test_by_keyboard_and_not_before_it_was_asked(browser: Browser, rig: Rig) -> None:
    with rig.engine() as engine:
        _by_keyboard(browser, rig, engine)


def _by_keyboard(browser: Browser, rig: Rig, engine: Engine) -> None:
    client, keys = engine.client, fill(engine)
    page = Look(browser, rig.url).page
    page.get_by_role("button", name="pin", exact=False).first.click()
    page.locator("#confirm-yes").click()
    expect(page.locator("#pins")).to_contain_text(f"{len(keys)} of {len(keys)} chunks")
    assert client.status()["num_pins"] == 1
    page.get_by_role("button", name="Unpin").click()
    expect(page.locator("#pins")).to_have_text("Nothing is pinned.")
    forget = page.locator("#chunks button.danger").first
    forget.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#confirm-title")).to_have_text("Forget this prefix?")
    page.keyboard.press("Enter")  # what is chosen at first is to leave it
    expect(page.locator("#confirm")).not_to_be_visible()
    assert client.status()["host"]["num_chunks"] == len(keys)
    # A list that was drawn anew meanwhile has other buttons, and the focus is with the old one.
    forget = page.locator("#chunks button.danger").first
    forget.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#confirm-title")).to_have_text("Forget this prefix?")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("forgot")
    assert client.status()["host"]["num_chunks"] == 0
    page.get_by_role("button", name="Drain…").click()
    page.locator("#confirm-yes").click()
    expect(page.locator("#state")).to_have_text("drained: takes no stores")
    page.get_by_role("button", name="Take stores again").click()
    expect(page.locator("#state")).to_have_text("all is well")
    page.close()


def test_a_long_prefix_is_forgotten_to_its_end(browser: Browser, rig: Rig) -> None:
    """Pages of chunks go by key: a tree of the first page alone has branches that are none."""
    with rig.engine() as engine:
        engine.tell()
        keys = engine.store(list(range(1100 * CHUNK)))
        page = Look(browser, rig.url).page
        expect(page.locator("#chunks > li")).to_have_count(1)
        page.locator("#chunks button.danger").click()
        page.locator("#confirm-yes").click()
        expect(page.locator("#said")).to_contain_text("forgot")
        assert len(keys) == 1100
        assert engine.client.status()["host"]["num_chunks"] == 0
        page.close()


def test_a_node_that_goes_and_comes_back(browser: Browser, rig: Rig) -> None:
    page = Look(browser, rig.url).page
    expect(page.locator("#state")).to_have_text("all is well")
    rig.stop_node()
    expect(page.locator("#state .bad")).to_be_visible()
    rig.start_node()
    expect(page.locator("#state")).to_have_text("all is well")
    page.close()


def test_a_token(browser: Browser, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("write: 0123456789abcdefghij\n")
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        rig = Rig(Path(folder), {"api.token_file": str(tokens)})
        try:
            page = Look(browser, rig.url).page
            expect(page.locator("#state")).to_have_text("a token is needed")
            expect(page.locator("#numbers div")).to_have_count(0)
            page.get_by_label("This API asks for a token").fill("0123456789abcdefghij")
            page.keyboard.press("Enter")
            expect(page.locator("#state")).to_have_text("all is well")
            expect(page.locator("#token")).not_to_be_visible()
            kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]
            page.close()
        finally:
            rig.close()


def test_every_file_of_it_is_served_with_its_policy(rig: Rig) -> None:
    from kvstrata.control.verbs.dashboard import PATHS

    assert len(PATHS) > 10
    for path in PATHS:
        with urllib.request.urlopen(rig.url + path) as answer:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert b"http://" not in answer.read().replace(b"http://www.w3.org/2000/svg", b"")
