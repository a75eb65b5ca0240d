"""A call's record: every token of its prompt was loaded, or has one reason."""

from __future__ import annotations

import time

import pytest
from tests.engine.plain import Texts
from tests.transformers.place import CHUNK, Place, eventually, greedy, load

from kvstrata.connectors.transformers.loads import Load
from kvstrata.connectors.transformers.records import record_of
from kvstrata.observe.reasons import Reason, Why

KEYS = [bytes([number]) * 32 for number in range(4)]
PROMPT = 4 * CHUNK + 10

LOADS = {
    "all": Load(KEYS, 4, 4, bytes(4)),
    "none": Load(KEYS, why=[Reason(Why.NEVER, 4)]),
    "some": Load(KEYS, 1, 1, bytes(1), [Reason(Why.EVICTED, 1), Reason(Why.NEVER, 9)]),
    "found and not come": Load(KEYS, 3, 1, bytes(3), [Reason(Why.NEVER, 1)], "chunk 1"),
    "failed at once": Load(KEYS, failed="CorruptObject: ..."),
    "too late": Load(KEYS, failed="DeadlineExceeded: ...", too_late=True),
    "not asked": Load([], failed="the node was too slow", too_late=True),
    "unexplained": Load(KEYS, 2, 2, bytes(2)),
}


@pytest.mark.parametrize("what", LOADS)
def test_every_token_is_accounted_for(what: str) -> None:
    record = record_of(LOADS[what], PROMPT, PROMPT + 5, CHUNK, time.monotonic(), ["host"])
    assert all(reason["tokens"] > 0 for reason in record["reasons"])
    reasons = sum(reason["tokens"] for reason in record["reasons"])
    assert reasons + record["loaded_tokens"] == PROMPT
    assert record["host_tokens"] == record["loaded_tokens"]
    causes = [reason["why"] for reason in record["reasons"]]
    assert ("deadline" in causes) == LOADS[what].too_late


def test_the_node_shows_it(place: Place, texts: Texts) -> None:
    (prompt,) = texts.of(300)
    model = load("tiny_gemma3")
    attached = place.attach(model)
    for _ in range(2):
        greedy(model, prompt, 2)
        assert attached.flush()
    eventually(lambda: len(place.node.status()["requests"]) == 2, "two records")
    cold, warm = place.node.status()["requests"]
    assert [reason["why"] for reason in cold["reasons"]] == ["never stored", "not a whole chunk"]
    assert warm["reasons"] == [{"why": "not a whole chunk", "tokens": 44}]
    assert warm["tier_tokens"] == {"host": 256}
    (namespace,) = place.node.status()["namespaces"]
    assert namespace["model"]["engine"] == "transformers"
    assert namespace["needs"] == [0, 3]
