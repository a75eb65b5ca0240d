"""The page "A day with a node": each command that it shows is run, and says what it shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.engine.engine import CHUNK, request
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
STEP = re.compile(r"^<!-- asks: (.*) -->$|^\$ (kvstrata .*)\n((?:(?!\$ |```).*\n)*)", re.MULTILINE)
DIFFERS = (
    (r"\b[0-9a-f]{8,64}\b", "HEX"),
    (r"unix:\S+", "SOCKET"),
    (r"namespace HEX: [^,]+,", "namespace HEX: MODEL,"),
    (r"pid \d+", "pid N"),
    (r"up \d+ \w+", "up N s"),
    (r"\d+(\.\d+)?[KMG]iB", "SIZE"),
    (r"KVStrata \d\S*", "KVStrata RELEASE"),
    (r"\b\d{1,2}\.\d{1,4}\b", "SECONDS"),
)


def plain(text: str) -> list[str]:
    """Lines without what differs from run to run, and without their spacing."""
    for pattern, word in DIFFERS:
        text = re.sub(pattern, word, text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_the_page_says_what_the_commands_say(
    tiny_llama: Path, texts: Texts, tmp_path: Path
) -> None:
    settings = {
        "host.capacity": "3MiB", "canary": "off",
        "disk.path": str(tmp_path / "disk"), "disk.capacity": "20GB", "disk.codec": "lossless",
    }  # fmt: skip
    manual, chat, *others = texts.of(4 * CHUNK + 20, 2 * CHUNK + 5, *[5 * CHUNK + 1] * 3)
    for name, tokens in (("manual", manual), ("chat", chat)):
        (tmp_path / f"{name}.json").write_text(json.dumps(tokens))
    with (
        Place(tiny_llama, settings, service=True) as place,
        closing(place.engine(max_model_len=2048)) as engine,
    ):
        place.await_ready(engine)
        file = tmp_path / "kvstrata.yaml"  # which JSON is too
        file.write_text(json.dumps(place.config.to_dict()))
        environment = {**os.environ, "KVSTRATA_CONFIG": str(file), "COLUMNS": "160"}
        known = {"manual": [manual], "chat": [chat], "other": others}

        def ask(name: str) -> None:
            engine.forget()
            before = place.count("requests_total")
            engine.answers([request(known[name].pop(0), 1)])
            eventually(lambda: place.count("requests_total") > before, "a record")
            place.flush()
            if name == "manual":
                known[name].append(manual)

        def run(command: str) -> str:
            shell = f'kvstrata() {{ "{sys.executable}" -m kvstrata.cli "$@"; }}; {command}'
            ran = subprocess.run(
                ["bash", "-c", shell], capture_output=True, text=True, cwd=tmp_path,
                env=environment, check=False, timeout=120,
            )  # fmt: skip
            assert ran.returncode == 0, (command, ran.stderr)
            return ran.stdout

        said: list[str] = []
        steps = list(STEP.finditer(PAGE.read_text(encoding="utf-8")))
        for asks, command, _ in (step.groups() for step in steps):
            for name in (asks or "").split():
                ask(name)
            if command:
                said += [f"$ {command}", *run(command).splitlines()]
    print(*said, sep="\n")
    shown = [f"$ {command}\n{answer}" for _, command, answer in map(re.Match.groups, steps)
             if command]  # fmt: skip
    assert len(shown) > 15
    assert plain("\n".join(said)) == plain("\n".join(shown))
