"""Other ways to cut the work: chunked prefill, preemption, ranks, drafts, compiled, processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, request, whole_chunks
from tests.engine.place import Place, eventually, known_tokens
from tests.engine.plain import Plain, Texts

pytestmark = pytest.mark.engine


@contextmanager
def detached(engine: Engine) -> Iterator[Plain]:
    """The same engine as a plain vLLM: nothing else differs."""
    engine.forget()
    engine.call("detach")
    yield Plain(engine)
    engine.forget()
    engine.call("attach")


def check_cold_and_warm(
    place: Place, engine: Engine, plain: Plain, prompts: list[Prompt], ranks: int = 1
) -> None:
    """Cold as plain vLLM, then all whole chunks hit in host memory, as plain vLLM upon its hit."""
    cold = engine.answers(prompts)
    assert {answer.cached for answer in cold} == {0}
    left = [known_tokens(*pair) for pair in zip(prompts, cold, strict=True)]
    place.await_stored(engine, left, ranks)
    engine.forget()
    warm = engine.answers(prompts)
    assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
    if plain.engine is not engine:
        assert [answer.tokens for answer in cold] == plain.cold(prompts)
        assert [answer.tokens for answer in warm] == plain.warm(prompts)
    else:
        with detached(engine):
            assert [answer.tokens for answer in cold] == plain.cold(prompts)
            assert [answer.tokens for answer in warm] == plain.warm(prompts)
    place.check()


@pytest.fixture(scope="module")
def narrow(tiny_llama: Path) -> Iterator[tuple[Place, Engine]]:
    """An engine that computes 256 tokens in a step and has 20 blocks."""
    with Place(tiny_llama) as place:
        options: dict[str, Any] = {
            "max_num_batched_tokens": 256,
            "num_gpu_blocks_override": 20,
            "max_model_len": 2048,
        }
        yield place, place.engine(**options)


def test_chunked_prefill(narrow: tuple[Place, Engine], prompts: list[Prompt]) -> None:
    place, engine = narrow
    assert sum(len(prompt) > 256 for prompt in prompts) > 20
    check_cold_and_warm(place, engine, Plain(engine), prompts)


def test_chunked_prefill_of_several_at_once(narrow: tuple[Place, Engine], texts: Texts) -> None:
    """Their chunks are stored and loaded while others compute."""
    place, engine = narrow
    prompts = texts.of(300, 440, 520, 390)
    with detached(engine) as plain:
        firsts = [tokens[0] for tokens in plain.cold(prompts)]
    for _ in range(3):
        answers = engine.answers(prompts, in_turn=False)
        assert [answer.tokens[0] for answer in answers] == firsts
        place.await_stored(engine, prompts)
        engine.forget()
    place.check()


def test_preemption(narrow: tuple[Place, Engine], texts: Texts) -> None:
    """More requests than blocks: their own KV comes back from KVStrata when they are resumed."""
    place, engine = narrow
    whole = engine.free_blocks()
    engine.call("preempted")
    num_preempted = num_loaded = num_equal = num_answers = 0
    for number in range(3):
        asked = [request(prompt, 160) for prompt in texts.of(*(260 + 17 * i for i in range(6)))]
        engine.forget()
        answers = engine.answers(asked, in_turn=False)
        num_preempted += engine.call("preempted")["count"]
        records = place.node.status()["requests"][-len(asked) :]
        num_loaded += sum(record["loaded_tokens"] > 0 for record in records)
        with detached(engine):
            expected = engine.answers(asked, in_turn=False)
            engine.call("preempted")
        for answer, other in zip(answers, expected, strict=True):
            assert len(answer.tokens) == 160
            # Batches alike up to the first preemption, and that comes after 32 tokens.
            assert answer.tokens[:32] == other.tokens[:32], number
            num_equal += answer.tokens == other.tokens
        num_answers += len(answers)
        assert engine.free_blocks() == whole
        place.check()
    assert num_preempted > 0
    assert num_loaded > 0
    assert num_answers >= 15
    # What was resumed was computed in other batches; still most answers agree to the end.
    assert num_equal > num_answers // 2


# Where a token takes long: several processes for each.
FEWER = (90, 129, 255, 300, 450, 600, 700, 1100)
TP_OPTIONS: dict[str, Any] = {"tensor_parallel_size": 2, "max_model_len": 4096, "new_tokens": 12}
TP_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.dear
def test_two_ranks(tiny_llama: Path, texts: Texts) -> None:
    """Each rank its own shard; a chunk without one of them is absent."""
    prompts = texts.of(*FEWER)
    with Place(tiny_llama) as place, Place(tiny_llama) as aside:
        place.use_disk()
        plain = Plain(aside.engine(with_kvstrata=False, environment=TP_ENVIRONMENT, **TP_OPTIONS))
        plain.engine.wait()
        engine = place.engine(environment=TP_ENVIRONMENT, **TP_OPTIONS)
        check_cold_and_warm(place, engine, plain, prompts, ranks=2)
        place.flush()

        # A shard that vanishes behind the node's back.
        prompt = prompts[-1]
        keys = engine.keys(prompt)
        place.node.clear(keys, ["host"])
        place.file(keys[4], rank=1).unlink()
        engine.forget()
        answer = engine.answer(prompt)
        loaded = place.loaded(prompt, answer)
        assert loaded <= 4 * CHUNK
        assert answer.tokens == plain.upon_hit(prompt, loaded)[0].tokens
        place.check()

        # And some that a new node never sees: of one rank or of the other.
        longer = [prompt for prompt in prompts[:-1] if len(prompt) >= 2 * CHUNK]
        found = {len(prompt): whole_chunks(len(prompt)) for prompt in prompts[:-1]}
        for number, prompt in enumerate(longer[::2]):
            keys = engine.keys(prompt)
            place.file(keys[1], rank=number % 2).unlink()
            found[len(prompt)] = CHUNK
        place.end()
        engine = place.engine(environment=TP_ENVIRONMENT, **TP_OPTIONS)
        place.await_ready(engine)
        answers = engine.answers(prompts[:-1])
        assert [answer.cached for answer in answers] == list(found.values())
        for prompt, answer in zip(prompts, answers, strict=False):
            if answer.cached == whole_chunks(len(prompt)):
                assert answer.tokens == plain.warm([prompt])[0]
            else:
                assert answer.tokens == plain.upon_hit(prompt, answer.cached)[0].tokens
        assert place.count('hit_chunks_total{tier="disk"}') == sum(found.values()) // CHUNK
        place.check()


@pytest.mark.dear
def test_speculative_decoding(smollm2: Path, texts: Texts) -> None:
    """Drafts out of the prompt itself: rejected ones are never stored."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    # Texts that repeat themselves, so that many drafts are right and many are not. Each ends
    # shortly before a chunk does, and the answer goes beyond it.
    prompts = [text * 2 for text in texts.of(50, 178)]
    with Place(smollm2) as place:
        engine = place.engine(speculative_config=drafts, disable_log_stats=False)
        check_cold_and_warm(place, engine, Plain(engine), prompts)
        # As many drafts are accepted from the node as upon vLLM's own hit.
        counts = [engine.call("drafts")]
        for _ in range(2):
            engine.answers(prompts)
            counts.append(engine.call("drafts"))
        warm, local = (
            {name: after[name] - before[name] for name in after}
            for before, after in pairwise(counts)
        )
        assert warm == local
        assert 0 < warm["accepted"] < warm["draft"]
        engine.forget()
        # What decode stored is right too: the next turn hits on it.
        for prompt in prompts:
            with detached(engine):
                first = engine.answer(prompt)
                follow = [*known_tokens(prompt, first), 198]
                expected = engine.answer(follow)
            engine.forget()
            assert engine.answer(prompt).tokens[0] == first.tokens[0]
            place.await_stored(engine, [known_tokens(prompt, first)])
            engine.forget()
            answer = engine.answer(follow)
            assert answer.cached == whole_chunks(len(follow)) > len(prompt)
            assert answer.tokens == expected.tokens
        place.check()


@pytest.mark.dear
def test_compiled_in_several_processes(tiny_llama: Path, texts: Texts) -> None:
    """torch.compile, and the engine core in a process of its own, as a server runs it."""
    prompts = texts.of(*FEWER)
    options: dict[str, Any] = {"enforce_eager": False, "new_tokens": 12}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with Place(tiny_llama) as place:
        plain = Plain(place.engine(with_kvstrata=False, environment=environment, **options))
        plain.engine.wait()
        engine = place.engine(environment=environment, **options)
        cold = engine.answers(prompts)
        assert {answer.cached for answer in cold} == {0}
        num_chunks = sum(len(known_tokens(*p)) // CHUNK for p in zip(prompts, cold, strict=True))
        eventually(lambda: place.count("stored_objects_total") >= num_chunks, "chunks stored")
        engine.forget()
        warm = engine.answers(prompts)
        assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
        assert [answer.tokens for answer in cold] == plain.cold(prompts)
        assert [answer.tokens for answer in warm] == plain.warm(prompts)
        place.check()
