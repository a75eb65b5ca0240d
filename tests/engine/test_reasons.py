"""Why each request of a real engine missed, as `kvstrata explain` and the page Reasons say it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import CHUNK, request
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts
from tests.engine.test_hybrid import adapter

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

PAGE = Path(__file__).parents[2] / "docs" / "reasons.md"


def shown(text: str) -> list[str]:
    """Lines without what differs from run to run."""
    text = re.sub(r"request \S+:", "request N:", text)
    text = re.sub(r"[\d.]+ (ms|s|minutes) before", "T before", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


class Asking:
    """A place with one engine, and its requests one after the other."""

    def __init__(self, place: Place, engine: Any) -> None:
        self.place, self.engine, self.said = place, engine, ""

    def ask(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        """Answer one request after vLLM has forgotten its own; its record."""
        self.engine.forget()
        before = self.place.count("requests_total")
        self.engine.answers([request(prompt, 1, **more)])
        eventually(lambda: self.place.count("requests_total") > before, "a record")
        record: dict[str, Any] = self.place.node.status()["requests"][-1]
        self.place.flush()
        return record

    def reasons(self, record: dict[str, Any]) -> list[tuple[str, int, str, str]]:
        """By tokens; what the engine had or loaded comes before."""
        told = [(r["why"], r["tokens"], r.get("tier", ""), r.get("detail", ""))
                for r in record["reasons"]]  # fmt: skip
        loaded = record["local_tokens"] + record["loaded_tokens"]
        assert loaded + sum(tokens for _, tokens, _, _ in told) == record["prompt_tokens"]
        return told

    def explain(self, *arguments: str) -> str:
        """What the command says; kept for the comparison with the page."""
        (socket,) = self.place.folder.rglob("*.sock")
        command = [sys.executable, "-m", "kvstrata.cli", "explain", *arguments]
        ran = subprocess.run(
            [*command, "--node", f"unix:{socket}"], capture_output=True, text=True, check=True
        )
        self.said += ran.stdout
        return ran.stdout


def test_why_did_this_request_miss(tiny_llama: Path, texts: Texts, tmp_path: Path) -> None:
    lora = str(adapter(tmp_path / "lora", 1))
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1,
                               "max_model_len": 2048}  # fmt: skip
    document, *others = texts.of(4 * CHUNK + 20, *[5 * CHUNK + 1] * 4)
    size, end = 4 * CHUNK, ("not a whole chunk", 20, "", "")
    with (
        Place(tiny_llama, {"host.capacity": "3MiB", "host.policy": "lru"}) as place,
        closing(place.engine(**options)) as engine,
    ):
        place.await_ready(engine)
        asking = Asking(place, engine)

        cold = asking.ask(document)
        assert asking.reasons(cold) == [("never stored", size, "", ""), end]
        asking.explain(cold["request"])

        hit = asking.ask(document)
        assert (hit["loaded_tokens"], asking.reasons(hit)) == (size, [end])
        asking.explain(hit["request"])

        place.node.clear()
        cleared = asking.ask(document)
        assert asking.reasons(cleared) == [("cleared", size, "host", ""), end]
        asking.explain(cleared["request"])

        for other in others:
            asking.ask(other)
        evicted = asking.ask(document)
        assert asking.reasons(evicted) == [("evicted", size, "host", ""), end]
        asking.explain(evicted["request"])

        adapted = asking.ask(document, lora=lora)
        assert asking.reasons(adapted) == [("another namespace", size, "", "adapter"), end]
        asking.explain(adapted["request"])

        salted = asking.ask(document, salt="alice")
        assert asking.reasons(salted) == [("never stored", size, "", ""), end]
        assert "somebody else" not in asking.explain(salted["request"])
        assert "(salt)" in asking.explain(salted["request"], "--across-tenants")

        tokens = tmp_path / "tokens.json"
        tokens.write_text(json.dumps(document))
        asking.explain("--tokens", f"@{tokens}")
    assert set(shown(asking.said)) <= set(shown(PAGE.read_text(encoding="utf-8")))
