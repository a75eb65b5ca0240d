"""``kvstrata top``: what it shows is what the node holds and does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console, Group
from tests.support.apis import CHUNK, Rig
from typer.testing import CliRunner

from kvstrata.cli import build_app
from kvstrata.cli.top import Rates, Watch
from kvstrata.errors import NodeUnavailable


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        started = Rig(Path(folder), {"canary": "off"})
        try:
            yield started
        finally:
            started.close()


def shown(watch: Watch, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(Group(*watch.look()))
    return " ".join(capture.get().split())


def test_one_look(rig: Rig) -> None:
    with rig.engine() as engine:
        engine.store(list(range(4 * CHUNK)))
        engine.client.record({
            "request": "cmpl-1", "outcome": "stopped", "prompt_tokens": 80, "local_tokens": 10,
            "loaded_tokens": 35, "tier_tokens": {"host": 35}, "seconds": 1.5,
            "reasons": [{"why": "evicted", "tokens": 35}],
        })  # fmt: skip
        for number, seconds in enumerate(("slow", -1, [2], float("nan"))):
            engine.client.record({"request": f"odd-{number}", "seconds": seconds})
        engine.client.status()
    arguments = [f"--set={name}={value}" for name, value in rig.options.items()]
    found = CliRunner().invoke(build_app(), ["top", "--once", *arguments])
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    assert "50% hit since it started" in words
    for expected in ("host 48KiB 16MiB", "KiB 64MiB", "cmpl-1 1.50 80 35 evicted"):
        assert expected in words, found.output
    assert "odd" not in words
    prefixes = words.partition("begins with")[2]
    assert " 4 " in prefixes.partition("slowest")[0]


def test_rates_are_between_two_looks_and_begin_anew_with_another_node(rig: Rig) -> None:
    watch = Watch(rig.config)
    try:
        assert "since it started" in shown(watch)
        assert " asked in " in shown(watch, width=40)
        rig.stop_node()
        with pytest.raises(NodeUnavailable):
            watch.look()
        rig.start_node()
        assert "since it started" in shown(watch)
    finally:
        watch.close()


def test_a_rate_is_what_was_added_a_second() -> None:
    rates = Rates({'a{tier="x"}': 30, 'a{tier="y"}': 7, "b": 5}, {'a{tier="x"}': 10}, 4.0)
    assert (rates.of("a", "x"), rates.of("a"), rates.of("b"), rates.of("c")) == (5, 6.75, 1.25, 0)


def test_no_node_is_said() -> None:
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        found = CliRunner().invoke(build_app(), ["top", "--once", f"--node=unix:{folder}/none"])
    assert found.exit_code == 1
    assert "Traceback" not in found.output
