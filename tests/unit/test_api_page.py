"""The API's page: its reference is the code's, and its examples run against a real API."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.apis import Rig
from tests.unit.test_tokenizing import model

from kvstrata.config import load_config
from kvstrata.config.files import read_file
from kvstrata.control.problems import Problem

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
URL = "http://127.0.0.1:7780"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every curl of the page, its continued lines as one."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    assert all(line.startswith("curl ") for line in lines)
    return lines


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        with rig.engine() as engine:
            engine.tell(name=str(model(Path(name) / "model")))
        yield rig
        rig.close()


def test_the_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "scripts/generate_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = PAGE.read_text(encoding="utf-8")
    assert page == module.page(), "stale: run scripts/generate_api.py"


def test_the_examples_run_in_their_order(rig: Rig) -> None:
    for command in commands():
        assert URL in command
        here = command.replace(URL, rig.url).replace("http://127.0.0.1:8000", "http://127.0.0.1:1")
        done = subprocess.run(
            ["bash", "-c", f"{here} -w '\\n%{{http_code}}'"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        body, _, status = done.stdout.rpartition("\n")
        assert status in ("200", "202"), done
        assert body


def test_the_python_example_runs(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks("python")
    exec(compile(source.replace(URL, rig.url), "example", "exec"), {})
    assert capsys.readouterr().out == "0 of 4 tokens would hit: {}\n"


def test_the_configuration_loads(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    (tmp_path / "kv.toml").write_text(text)
    assert len(load_config(environ={}, overrides=read_file(tmp_path / "kv.toml")).sources) == 4


def test_the_problem_is_one(rig: Rig) -> None:
    (text,) = blocks("json")
    told = rig.ask("POST", "/v1/lookup", {"tokens": [1, 2, -3]}).body
    assert json.loads(text) == told
    assert Problem.model_validate(told).model_dump() == told
