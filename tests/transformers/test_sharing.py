"""A real vLLM and a model in Python load each other's KV, where both are told to share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from tests.engine.engine import CHUNK, whole_chunks
from tests.engine.place import Place
from tests.engine.plain import Texts
from tests.transformers.place import eventually, greedy, load

from kvstrata.connectors.transformers import attach
from kvstrata.testing.models import smollm2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

NEW = 8
SHARE = {"share": "engines"}


@pytest.fixture(scope="module")
def node() -> Iterator[Place]:
    """A node for both, and vLLM's settings."""
    with Place(smollm2(), {"host.capacity": "512MiB", "deadlines.load": "30s"}, True) as place:
        yield place


def settings(node: Place) -> dict[str, Any]:
    """KVStrata's options, dotted."""
    return dict(node.connector["kv_connector_extra_config"])


def test_both_ways(node: Place, texts: Texts) -> None:
    """Of real text and a real model in bfloat16; the answers are those that each gives alone."""
    theirs, ours = texts.of(1000, 1001)
    model = load("smollm2", "bfloat16")
    alone = {len(prompt): greedy(model, prompt, NEW) for prompt in (theirs, ours)}
    with (
        closing(node.engine(settings=SHARE, new_tokens=NEW)) as engine,
        attach(model, **{**settings(node), **SHARE}) as attached,
    ):
        # vLLM computes, the model in Python loads.
        answer = engine.answer(theirs)
        assert answer.cached == 0
        eventually(lambda: node.count("stored_objects_total") == len(theirs) // CHUNK, "stored")
        assert greedy(model, theirs, NEW) == [*theirs, *answer.tokens] == alone[1000]
        assert attached.last.loaded_tokens == whole_chunks(len(theirs))
        eventually(lambda: bool(node.node.status()["requests"]), "its record")
        record = node.node.status()["requests"][-1]
        assert record["loaded_from"] == {"vllm": whole_chunks(len(theirs))}
        # And the other way round.
        assert greedy(model, ours, NEW) == alone[1001]
        assert attached.last.loaded_tokens == 0
        assert attached.flush()
        answer = engine.answer(ours)
        assert answer.cached == whole_chunks(len(ours))
        assert node.loaded(ours, answer) == whole_chunks(len(ours))
        assert [*ours, *answer.tokens] == alone[1001]
        record = node.node.status()["requests"][-1]
        assert record["loaded_from"] == {"transformers": whole_chunks(len(ours))}
    node.check()


def test_not_by_default(node: Place, texts: Texts) -> None:
    (prompt,) = texts.of(400)
    model = load("smollm2", "bfloat16")
    with attach(model, **{**settings(node), **SHARE}) as attached:
        greedy(model, prompt, 1)
        assert attached.flush()
    with attach(model, **settings(node)) as attached:
        greedy(model, prompt, 1)
        assert attached.last.loaded_tokens == 0
    with attach(model, **{**settings(node), **SHARE}, context_tokens=4096) as attached:
        greedy(model, prompt, 1)
        assert attached.last.loaded_tokens == 0
    with attach(model, **{**settings(node), **SHARE}) as attached:
        greedy(model, prompt, 1)
        assert attached.last.loaded_tokens == 384
