"""What is blended stays with whoever asked for it: mixed requests in a real vLLM, short of blocks.

Exact requests must be answered as plain vLLM does, in float32 to the last token, while others of
the same texts are blended beside them, preempted and answered; and so must the blended prompts
themselves be afterwards, out of vLLM's own cache and out of the node.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.engine.engine import Prompt, request
from tests.engine.place import Place
from tests.engine.plain import Texts

from kvstrata.blend import PLANS

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SETTINGS = {"blend": "on", "hints": "blend", "inside": "on", "host.capacity": "256MiB"}
CALM: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048}
BLOCKS = 24
"""Fewer than eight requests need that run at once."""
AT_ONCE, NEW = 8, 40


class Asked(NamedTuple):
    """A prompt of texts, and where they are in it."""

    tokens: Prompt
    segments: list[list[int]]

    def request(self, plan: str | None, ratio: float = 0.15) -> dict[str, Any]:
        blend: dict[str, Any] = {"segments": self.segments}
        if plan is not None:
            blend |= {"plan": plan, "ratio": ratio}
        return request(self.tokens, NEW, transfer={"kvstrata": {"blend": blend}})


def joined(texts: Sequence[Prompt], question: Prompt) -> Asked:
    tokens: Prompt = []
    segments = []
    for text in texts:
        segments.append([len(tokens), len(tokens) + len(text)])
        tokens += text
    return Asked(tokens + question, segments)


@pytest.mark.parametrize("rounds", [20, pytest.param(125, marks=pytest.mark.more)])
def test_mixed_requests_poison_nobody(
    tmp_path: Path, tiny_llama: Path, texts: Texts, rounds: int
) -> None:
    chance = random.Random(7)
    bodies = texts.of(*(chance.randint(90, 330) for _ in range(8)))
    questions = texts.of(*(chance.randint(5, 60) for _ in range(12)))
    with Place(tiny_llama, SETTINGS) as place:
        options = {**CALM, "num_gpu_blocks_override": BLOCKS}
        engine = place.engine(**options)
        plain = place.engine(with_kvstrata=False, **{**CALM, "num_gpu_blocks_override": 256})
        engine.answers([request(bodies[0], 1)])  # it shows that it can
        blended: dict[tuple[int, ...], Asked] = {}
        preempted = 0
        for _ in range(rounds):
            asked: list[dict[str, Any]] = []
            exact: list[tuple[int, Asked]] = []
            for _ in range(AT_ONCE):
                one = joined(chance.sample(bodies, chance.randint(1, 4)), chance.choice(questions))
                if chance.random() < 0.6:
                    blended[tuple(one.tokens)] = one
                    asked.append(one.request(chance.choice(PLANS), chance.random()))
                    continue
                exact.append((len(asked), one))
                names = chance.random() < 0.5
                asked.append(one.request(None) if names else request(one.tokens, NEW))
            answers = engine.answers(asked, in_turn=False)
            wanted = plain.answers([request(one.tokens, NEW) for _, one in exact], in_turn=False)
            for (number, _), right in zip(exact, wanted, strict=True):
                assert answers[number].tokens == right.tokens
            preempted += engine.call("preempted")["count"]
            if chance.random() < 0.3:
                engine.forget()
        records = place.node.status()["requests"]
        print(rounds * AT_ONCE, "requests", preempted, "preempted", len(blended), "blended")
        assert any(record.get("blended_tokens") for record in records)
        assert preempted > 0
        # Everything that was blended, asked for exactly: of vLLM's own cache, then of the node.
        prompts = [request(one.tokens, 8) for one in chance.sample([*blended.values()], 40)]
        wanted = plain.answers(prompts)
        for forgets in (False, True):
            if forgets:
                engine.forget()
            assert [one.tokens for one in engine.answers(prompts)] == [w.tokens for w in wanted]
        place.check()
