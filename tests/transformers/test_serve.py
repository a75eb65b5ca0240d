"""The recipes of the page and the example, run as they are shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tests.engine.plain import Texts
from tests.transformers.place import Place, eventually

from kvstrata.testing.models import Tokenizer, tiny_llama
from kvstrata.testing.ports import free_port
from kvstrata.testing.serving import Program

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "transformers.md"


def environment(place: Place, **more: str) -> dict[str, str]:
    """Of a process that finds the node here by its environment alone."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(place.folder / "hf"),
        "KVSTRATA_NODE": str(place.settings["node"]),
        "KVSTRATA_SECRET_FILE": str(place.settings["secret_file"]),
        "KVSTRATA_DEADLINES_REQUEST": "20s",
        "XDG_RUNTIME_DIR": str(place.folder),
        **more,
    }


def served(folder: Path) -> Path:
    """A model's folder with the page's file in it."""
    recipe = re.search(
        r"```python\n# custom_generate/generate.py\n(.*?)```", PAGE.read_text(), re.S
    )
    assert recipe is not None
    (folder / "custom_generate").mkdir(parents=True)
    (folder / "custom_generate" / "generate.py").write_text(recipe[1])
    for file in tiny_llama().iterdir():
        (folder / file.name).symlink_to(file)
    return folder


CHILD = """
import sys
from tests.transformers.place import greedy, load
from kvstrata.connectors.transformers.attaching import session_of
model, prompt = load("tiny_llama"), list(range(5, 305))
alone = greedy(model, prompt, 4)
for loaded in (0, 256):
    assert greedy(model, prompt, 4, custom_generate=sys.argv[1], trust_remote_code=True) == alone
    session = session_of(model)
    assert session.last.loaded_tokens == loaded, session.last
    assert session.flush()
assert "generate" not in vars(model)
"""


def test_custom_generate_of_one_call(place: Place) -> None:
    folder = served(place.folder / "one-call")
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_transformers_serve(place: Place, texts: Texts, tokenizer: Tokenizer) -> None:
    """The page's file in a model's folder, and two turns over HTTP."""
    folder = served(place.folder / "served")
    before, records = stored(place), len(place.node.status()["requests"])
    port = free_port()
    command = re.search(r"transformers serve MODEL (.*)", PAGE.read_text())
    assert command is not None
    server = Program(
        ["-m", "transformers.cli.transformers", "serve", str(folder), *command[1].split(),
         "--device=cpu", "--host=127.0.0.1", f"--port={port}"],
        port, place.folder / "serve.log", environment(place),
    )  # fmt: skip
    try:
        server.wait()
        (text,) = texts.of(400)
        chat = [{"role": "user", "content": tokenizer.decode(text)}]  # type: ignore[attr-defined]
        first = say(server.url, folder, chat)
        chat += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
        eventually(lambda: stored(place) >= before + 3, "the first turn is stored")
        say(server.url, folder, chat)
    finally:
        server.kill()
    eventually(lambda: len(place.node.status()["requests"]) == records + 2, "two records")
    one, two = place.node.status()["requests"][-2:]
    assert one["loaded_tokens"] == 0
    assert two["loaded_tokens"] >= 256
    assert two["prompt_tokens"] > one["prompt_tokens"]


def stored(place: Place) -> float:
    """Objects that the node here was given."""
    count: float = place.node.status()["counters"].get("stored_objects_total", 0)
    return count


def say(url: str, model: Path, chat: list[dict[str, str]]) -> str:
    """The answer to a chat."""
    body = {"model": str(model), "messages": chat, "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    content: str = answer["choices"][0]["message"]["content"]
    return content


def run(example: str, place: Place) -> str:
    """What an example says."""
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), str(tiny_llama())],
        env=environment(place),  # its own options would be another node's
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "'errors': {}" in ran.stdout
    return ran.stdout


def test_the_example_of_selected_tokens(place: Place) -> None:
    lines = re.findall(r"^ *(\w+): ([\d,]+) tokens", run("transformers_selected.py", place), re.M)
    assert [how for how, _ in lines] == ["made", "exact", "found", "exact"]
    loaded = [int(count.replace(",", "")) for _, count in lines]
    assert loaded[2] == loaded[3] > 0


def test_the_example(place: Place) -> None:
    said = run("transformers_chat.py", place)
    turns = re.findall(r"^([\d,]+) tokens, ([\d,]+) of them loaded", said, re.M)
    lengths, loaded = zip(*[[int(n.replace(",", "")) for n in turn] for turn in turns], strict=True)
    assert loaded[0] == 0
    assert all(length - count < 250 for length, count in zip(lengths[1:], loaded[1:], strict=True))
