"""What clients and other machines choose does nothing to a terminal, and is no markup."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel
from rich.console import Console
from tests.support.apis import Rig
from typer.testing import CliRunner

from kvstrata.cli import build_app
from kvstrata.cli.cluster import table
from kvstrata.cli.join import fail
from kvstrata.cli.plain import json_text, plain
from kvstrata.control import Client as Api
from kvstrata.errors import UsageError
from kvstrata.fleet.members import Holding, Member

HOSTILE = "\x1b]0;x\x07\x1b[2J[red]a[/b]\u009b31m\u202e\n"


def test_what_moves_cursors_or_text_is_replaced() -> None:
    assert plain("a b… é 漢\x1b\x07\n\r\u009b\u202e\u2066\u200b") == "a b… é 漢" + "\ufffd" * 8


def test_a_request_and_a_model_of_such_names() -> None:
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        rig = Rig(Path(folder), {"canary": "off"})
        try:
            with rig.engine() as engine:
                engine.tell(name=HOSTILE)
                engine.client.record({
                    "request": HOSTILE, "outcome": HOSTILE, "prompt_tokens": 9, "loaded_tokens": 0,
                    "seconds": 1.0, "miss": HOSTILE,
                    "reasons": [{"why": "bypassed", "tokens": 9, "detail": HOSTILE}],
                })  # fmt: skip
                engine.client.status()
                arguments = [f"--set={name}={value}" for name, value in rig.options.items()]
                for words in (["status"], ["top", "--once"], ["explain", "[red]a[/b]"]):
                    _harmless(words, arguments)
        finally:
            rig.close()


def _harmless(words: list[str], arguments: list[str]) -> None:
    found = CliRunner().invoke(build_app(), [*words, *arguments], env={"COLUMNS": "250"})
    assert found.exit_code == 0, found.output
    assert "[red]a[/b]" in found.output
    assert not {"\x1b", "\x07", "\u009b", "\u202e"} & set(found.output)


def test_a_member_of_such_a_name() -> None:
    tiers = [Holding(HOSTILE)]
    member = Member(HOSTILE, 1, HOSTILE, 1, 1, peers=HOSTILE, tiers=tiers)
    out = io.StringIO()
    Console(file=out, width=250).print(table([member]))
    assert "[red]a[/b]" in out.getvalue()
    assert not {"\x1b", "\x07", "\u009b", "\u202e"} & set(out.getvalue())


def test_an_error_of_such_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="1"):
        fail(UsageError(HOSTILE))
    assert "\x1b" not in capsys.readouterr().err


def test_json_for_programs_is_printable_ascii_and_says_the_same() -> None:
    value = {HOSTILE: [HOSTILE + "\x7f\u0085 é 漢", 1.5, None, True]}
    for indent in (None, 2):
        text = json_text(value, indent)
        assert text.replace("\n", "").isascii()
        assert text.replace("\n", "").isprintable()
        assert json.loads(text) == value


class Told(BaseModel):
    name: str = HOSTILE + "\x7f"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("lookup", ["lookup", "text", "--json"]),
        ("inspect", ["inspect", "00" * 32, "--json"]),
        ("jobs", ["jobs", "--json"]),
        ("chunks", ["ls", "--json"]),
    ],
)
def test_so_print_the_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str, words: list[str]
) -> None:
    told = Told()
    page = SimpleNamespace(
        jobs=[told], chunks=[told], next="", model_dump=told.model_dump, problem="", nbytes=1
    )
    monkeypatch.setattr(Api, verb, lambda *given, **named: page)
    node = f"--node=unix:{tmp_path}/none.sock"
    found = CliRunner().invoke(build_app(), [*words, node])
    assert found.exit_code == 0, found.output
    assert found.stdout.replace("\n", "").isascii()
    assert found.stdout.replace("\n", "").isprintable()
    assert json.loads(found.stdout) == {"name": told.name}
