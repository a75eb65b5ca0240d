"""A hit of less than everything, of more than prompts, or of what is damaged changes no answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engine.engine import CHUNK, NEW_TOKENS, Prompt, request, whole_chunks
from tests.engine.place import Place, eventually, known_tokens
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Shared

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

MULTIPLES = (128, 256, 384, 512, 640, 1024)


def await_keys(place: Place, keys: list[bytes]) -> None:
    """Wait until all of these chunks are stored."""
    eventually(lambda: 255 not in place.node.lookup(keys, [0]), "stored")


def test_hit_of_the_whole_prompt(shared: Shared, plain: Plain, texts: Texts) -> None:
    """One token is left to compute, where vLLM's own hit would leave a block: first tokens."""
    place, engine = shared
    prompts = texts.of(*MULTIPLES)
    cold = engine.answers(prompts)
    assert [answer.tokens for answer in cold] == plain.cold(prompts)
    place.await_stored(engine, prompts)
    engine.forget()
    warm = engine.answers(prompts)
    assert [answer.cached for answer in warm] == [len(prompt) - 1 for prompt in prompts]
    for one, other in zip(warm, cold, strict=True):
        assert one.tokens[:2] == other.tokens[:2]
    engine.forget()
    # Several at once are loaded in the background, whole, and vLLM itself backs off one token.
    together = engine.answers(prompts, in_turn=False)
    for one, other in zip(together, cold, strict=True):
        assert one.tokens[0] == other.tokens[0]
        assert one.cached > 0
    place.check()


def test_only_what_lies_beyond_vllm_s_own_hit_is_loaded(
    shared: Shared, plain: Plain, texts: Texts
) -> None:
    place, engine = shared
    prompts = texts.of(*(5 * CHUNK + 7 + i for i in range(4)))
    cold = engine.answers(prompts)
    place.await_stored(engine, prompts)
    for local, prompt, before in zip((1, 2, 4, 5), prompts, cold, strict=True):
        engine.forget()
        engine.answer(prompt[: local * CHUNK + 3], 1)
        answer = engine.answer(prompt)
        assert answer.cached == 5 * CHUNK
        record = place.last_record(len(prompt) + NEW_TOKENS)
        assert record["loaded_tokens"] == (5 - local) * CHUNK
        assert answer.tokens == plain.warm([prompt])[0]
        assert answer.tokens[0] == before.tokens[0]
    place.check()


def test_chat_of_six_turns(shared: Shared, plain: Plain, texts: Texts) -> None:
    """Tokens that were generated hit in the next turn."""
    place, engine = shared
    plain.engine.forget()
    for number in range(5):
        (history,) = texts.of(180 + 17 * number)
        (follow,) = texts.of(700)
        prompted = spoken = 0
        for turn in range(6):
            # Each question ends shortly before a chunk does, and the answer goes beyond it.
            length = (len(history) + 30) // CHUNK * CHUNK + 110 if turn else CHUNK + 110
            history = (history + follow)[:length]
            engine.forget()
            ours, theirs = engine.answer(history), plain.engine.answer(history)
            assert ours == theirs
            if turn:
                assert ours.cached == whole_chunks(spoken)
                assert ours.cached > prompted, "the hit ends in the last turn's prompt"
            left = known_tokens(history, ours)
            place.await_stored(engine, [left])
            prompted, spoken = len(history), len(left)
            history = [*history, *ours.tokens]
    place.check()


def test_salts_never_share(shared: Shared, plain: Plain, texts: Texts) -> None:
    place, engine = shared
    prompts = texts.of(*(300 + 11 * i for i in range(4)))
    for salt in ("", "alice", "bob"):
        engine.forget()
        answers = engine.answers([request(prompt, salt=salt) for prompt in prompts])
        assert {answer.cached for answer in answers} == {0}, f"salt {salt!r} hit another's"
        assert [answer.tokens for answer in answers] == plain.cold(prompts)
        for prompt in prompts:
            await_keys(place, engine.keys(prompt, salt))
    for salt in ("bob", "", "alice"):
        engine.forget()
        answers = engine.answers([request(prompt, salt=salt) for prompt in prompts])
        assert [answer.cached for answer in answers] == [whole_chunks(len(p)) for p in prompts]
        assert [answer.tokens for answer in answers] == plain.warm(prompts)
    place.check()


def test_flipped_bit_on_disk(shared: Shared, plain: Plain, texts: Texts) -> None:
    """A counted miss, the right answer, and the object can be stored again, and hit."""
    place, engine = shared
    prompts = texts.of(*(290 + 130 * (i % 4) for i in range(8)))
    engine.answers(prompts)
    place.await_stored(engine, prompts)
    place.flush()
    for number, prompt in enumerate(prompts):
        keys = engine.keys(prompt)
        place.node.clear(keys, ["host"])
        broken = number % len(keys)
        flip(place.file(keys[broken]), 8 * (4096 + 1000 * number) + number)
        corrupt = place.count("corrupt_objects_total")
        engine.forget()
        answer = engine.answer(prompt)
        assert place.count("corrupt_objects_total") == corrupt + 1
        loaded = place.loaded(prompt, answer)
        assert loaded <= broken * CHUNK
        assert answer.tokens == plain.upon_hit(prompt, loaded)[0].tokens
        place.await_stored(engine, [prompt])
        place.flush()
        place.node.clear(keys, ["host"])
        engine.forget()
        assert engine.answer(prompt) == plain.upon_hit(prompt, loaded)[1]
        assert place.count("corrupt_objects_total") == corrupt + 1
    place.check()


def test_node_that_stops_while_it_loads(shared: Shared, plain: Plain, texts: Texts) -> None:
    """The deadline of a load passes: computed, right, and warm again when the node goes on."""
    place, engine = shared
    prompts = texts.of(700, 1100)
    engine.answers(prompts)
    place.await_stored(engine, prompts)
    place.flush()
    for prompt in prompts:
        place.node.clear(engine.keys(prompt), ["host"])
        engine.forget()
        with place.stopped_at_load(engine):
            answer = engine.answer(prompt)
        assert answer.tokens == plain.cold([prompt])[0]
        place.check()
        engine.forget()
        assert engine.answer(prompt) == plain.both(prompt)[1]
    place.check()


def test_after_eviction_of_half_the_chunks(
    shared: Shared, plain: Plain, prompts: list[Prompt]
) -> None:
    """Tails of half the prompts, and one chunk in the middle of the others; on disk too."""
    place, engine = shared
    cold = engine.answers(prompts)
    place.await_stored(engine, [known_tokens(*pair) for pair in zip(prompts, cold, strict=True)])
    place.flush()
    expected = []
    for number, prompt in enumerate(prompts):
        keys = engine.keys(prompt)
        half = len(keys) // 2
        place.node.clear(keys[half:] if number % 2 else keys[half : half + 1])
        expected.append(half * CHUNK)
    engine.forget()
    with ThreadPoolExecutor(1) as aside:
        plainly = [aside.submit(plain.upon_hit, *asked)
                   for asked in zip(prompts, expected, strict=True)]  # fmt: skip
        answers = engine.answers(prompts)
        assert [answer.cached for answer in answers] == expected
        # What was missing was computed, and is stored again.
        place.await_stored(engine, prompts)
        engine.forget()
        again = engine.answers(prompts)
        for number, (answer, second, reference) in enumerate(
            zip(answers, again, plainly, strict=True)
        ):
            first, then = reference.result()
            assert answer == first
            assert second.cached == then.cached
            # A gap in the middle: what is behind it was not stored again, and stayed as it was
            # computed at first, in another batch than plain vLLM's.
            assert (
                second.tokens == then.tokens if number % 2 else second.tokens[0] == then.tokens[0]
            )
    place.check()


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
