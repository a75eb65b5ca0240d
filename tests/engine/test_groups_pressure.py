"""Models of several kinds of layers under pressure: little room, small steps, nodes that die.

Each part has the name of an issue that others had with such models.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engine.engine import Prompt, request, whole_chunks
from tests.engine.kinds import KINDS, PARAMS, Kind
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts
from tests.engine.test_groups import await_hits
from tests.engine.test_parallel import detached

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]


class Narrow:
    """An engine with few blocks and small steps; it is plain vLLM too, without its connector."""

    def __init__(self, kind: Kind, place: Place, texts: Texts) -> None:
        options = {"max_num_batched_tokens": kind.step, "num_gpu_blocks_override": kind.few_blocks}
        self.kind = kind
        self.place = place
        self.texts = texts
        self.engine = place.engine(**kind.engine(**options, max_model_len=1280))

    def cached(self, prompts: list[Prompt]) -> list[int]:
        """Tokens that each has cached once it is stored."""
        return [whole_chunks(len(prompt)) for prompt in prompts]

    def expected(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
        """Plain vLLM's answers: cold, and upon its own hit of all whole chunks."""
        with detached(self.engine) as plain:
            return plain.cold(prompts), plain.warm(prompts)


@pytest.fixture(scope="module", params=PARAMS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def narrow(kind: Kind) -> Iterator[Narrow]:
    from transformers import AutoTokenizer

    texts = Texts(AutoTokenizer.from_pretrained(kind.folder), f"narrow {kind.name}")
    with Place(kind.folder) as place:
        place.use_disk()
        yield Narrow(kind, place, texts)


def test_several_chunks_in_several_steps(narrow: Narrow) -> None:
    """Loads of 2, 3, 5 and 8 chunks into an engine that computes less in a step (LMCache#4984)."""
    engine, prompts = narrow.engine, narrow.texts.of(300, 450, 700, 1100)
    cold = engine.answers(prompts)
    assert {answer.cached for answer in cold} == {0}
    await_hits(engine, prompts, narrow.cached(prompts))
    engine.forget()
    warm = engine.answers(prompts)
    assert [answer.cached for answer in warm] == narrow.cached(prompts)
    expected = narrow.expected(prompts)
    assert ([a.tokens for a in cold], [a.tokens for a in warm]) == expected


def test_a_prompt_that_parts_from_another(narrow: Narrow) -> None:
    """It hits up to there, or up to the end of the last step before, where a state is kept."""
    engine, (first, second) = narrow.engine, narrow.texts.of(700, 700)
    engine.answer(first, 1)
    await_hits(engine, [first], narrow.cached([first]))
    parted = [*first[:500], *second[500:]]
    engine.forget()
    answer = engine.answer(parted)
    assert answer.cached == whole_chunks(500)
    (cold,), _ = narrow.expected([parted])
    # Later tokens may be rounded otherwise, since the work is cut otherwise.
    assert answer.tokens[0] == cold[0]


def test_a_hit_that_lies_in_vllm_s_own_cache_in_part(narrow: Narrow) -> None:
    """Attention is in vLLM's cache still, what a window or a state needs is not (LMCache#4247)."""
    engine, prompts = narrow.engine, narrow.texts.of(300, 700)
    engine.answers(prompts)
    await_hits(engine, prompts, narrow.cached(prompts))
    cold, warm = narrow.expected(prompts)
    for prompt, computed, hit in zip(prompts, cold, warm, strict=True):
        # From the node, and then where the node has nothing either.
        for found in (True, False):
            engine.forget()
            engine.answer(prompt, 1)
            engine.call("evict_others", tokens=prompt)
            if not found:
                narrow.place.node.clear(engine.keys(prompt))
            answer = engine.answer(prompt)
            if found:
                assert answer.cached == whole_chunks(len(prompt))
            assert answer.tokens in (computed, hit)
            engine.forget()
        engine.answer(prompt)
        await_hits(engine, [prompt], narrow.cached([prompt]))


def test_hits_from_outside_while_blocks_run_out(narrow: Narrow) -> None:
    """Several at once, of which some hit in vLLM, some in the node, some nowhere (vllm#50454)."""
    engine = narrow.engine
    prompts = narrow.texts.of(*(narrow.kind.crowd + 17 * i for i in range(6)))
    whole = engine.free_blocks()
    cold, warm = narrow.expected(prompts)
    engine.answers([request(prompt, 1) for prompt in prompts[:4]])
    await_hits(engine, prompts[:4], narrow.cached(prompts[:4]))
    engine.forget()
    engine.answers([request(prompt, 1) for prompt in prompts[:2]])
    engine.call("preempted")
    answers = engine.answers([request(prompt, 160) for prompt in prompts], in_turn=False)
    assert engine.call("preempted")["count"] > 0
    assert {len(answer.tokens) for answer in answers} == {160}
    assert engine.free_blocks() == whole
    if not narrow.kind.steady:
        return  # what a batch computed is stored, and is otherwise than what is computed alone
    # What is computed in other batches may be rounded otherwise; still most begin alike.
    alike = [a.tokens[0] in (c[0], w[0]) for a, c, w in zip(answers, cold, warm, strict=True)]
    assert sum(alike) > len(alike) // 2
    # Nothing of all that is stored wrong.
    engine.forget()
    again = engine.answers(prompts)
    assert all(a.tokens in pair for a, *pair in zip(again, cold, warm, strict=True))


def test_aborted_while_they_load(narrow: Narrow) -> None:
    engine, prompts = narrow.engine, narrow.texts.of(300, 450, 700)
    whole = engine.free_blocks()
    engine.answers([request(prompt, 1) for prompt in prompts])
    await_hits(engine, prompts, narrow.cached(prompts))
    narrow.place.flush()
    narrow.place.node.clear(tiers=["host"])
    engine.forget()
    engine.call("abort_soon", requests=[request(p) for p in prompts], steps=[0, 1, 2])
    eventually(lambda: engine.free_blocks() == whole, "all blocks are free")
    cold, warm = narrow.expected(prompts)
    answers = engine.answers(prompts)
    assert all(a.tokens in pair for a, *pair in zip(answers, cold, warm, strict=True))


def test_the_node_dies_under_a_load(narrow: Narrow) -> None:
    engine, prompts = narrow.engine, narrow.texts.of(450, 700)
    cold, warm = narrow.expected(prompts)
    whole = engine.free_blocks()
    engine.answers([request(prompt, 1) for prompt in prompts])
    await_hits(engine, prompts, narrow.cached(prompts))
    narrow.place.flush()
    narrow.place.node.clear(tiers=["host"])  # what is loaded has to come from the disk first
    engine.forget()
    pid = narrow.place.node.hello.pid
    engine.call("stop_at_load", pid=pid)
    with ThreadPoolExecutor(1) as aside:
        asked = aside.submit(engine.answers, prompts)
        eventually(lambda: stopped(pid), "a load has begun")
        os.kill(pid, signal.SIGKILL)
        answers = asked.result()
    assert all(a.tokens in pair for a, *pair in zip(answers, cold, warm, strict=True))
    assert engine.free_blocks() == whole
    await_hits(engine, prompts, narrow.cached(prompts))
    assert narrow.place.client().hello.pid != pid
    engine.forget()
    assert [answer.tokens for answer in engine.answers(prompts)] == warm


def stopped(pid: int) -> bool:
    """Whether a process stands still."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
