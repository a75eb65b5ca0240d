"""What a prompt parts from inside it, on a real vLLM: tokens as plain vLLM's, and every KV right.

A CPU block is packed: keys and values of sixteen tokens, or of two, lie interleaved. So where a
load ends inside a block, and the engine writes on behind it, it is looked at token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from tests.engine.engine import CHUNK, Answer, Engine, Prompt, whole_chunks
from tests.engine.place import Place, eventually, known_tokens
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines

from kvstrata.layout import LayerGroup, native_order
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

pytestmark = pytest.mark.engine

NEW = 8
LENGTH = 300  # two chunks, and 44 tokens


class Site(NamedTuple):
    """A place, an engine there, and plain vLLM beside it."""

    place: Place
    engine: Engine
    plain: Plain
    dtype: str

    def ask(self, prompt: Prompt) -> tuple[Answer, int, str]:
        """What is answered, how many of the prompt's tokens were loaded, and how."""
        answer = self.engine.answer(prompt)
        loaded = self.place.loaded(prompt, answer)
        record = self.place.last_record(len(prompt) + len(answer.tokens))
        return answer, loaded, record["load"]

    def store(self, prompt: Prompt) -> list[int]:
        """Have the node know a prompt and its answer, and vLLM forget it; the tokens it has."""
        stored = self.place.count("stored_objects_total")
        known = known_tokens(prompt, self.engine.answer(prompt))
        objects = -(-len(known) // CHUNK)
        eventually(
            lambda: self.place.count("stored_objects_total") == stored + objects,
            "whole chunks and the end are stored",
            30.0,
        )
        self.engine.forget()
        return known

    def check(self, prompt: Prompt, answer: Answer) -> None:
        """The answer is plain vLLM's, and so is, but for rounding, the KV of every token."""
        allowed = [one.tokens for one in self.plain.both(prompt)]
        if self.dtype == "float32":
            assert answer.tokens in allowed
        ours, theirs = self._kv(self.engine, prompt), self._kv(self.plain.engine, prompt)
        assert ours.shape == theirs.shape
        off = np.abs(ours - theirs).max(axis=(0, 1, 2, 4)) / np.abs(theirs).max()
        most = 1e-3 if self.dtype == "float32" else 0.05
        assert (off <= most).all(), f"tokens {np.flatnonzero(off > most)}: {off.max()}"

    def _kv(self, engine: Engine, tokens: Prompt) -> npt.NDArray[np.float32]:
        """KV of the tokens of full blocks, as (L, S, H, T, D)."""
        order = self.place.node.status()["namespaces"][-1]["orders"][0]
        matched: p.Matched = self.place.node.match(self.engine.keys(tokens)[:1], [0], [order]).wait(
            10.0
        )
        (offset,) = offsets_of(matched.offsets)
        header = decode(self.place.node.pool.view(offset, HEADER_BYTES))
        self.place.node.release(matched.lease)
        layers, _, states, heads, _, dim = header.shape
        group = LayerGroup(0, "full", layers, heads, dim, states, header.dtype)
        elements = native_order(header.order).unpack_layers(engine.kv(tokens), group)
        if self.dtype == "float32":
            return elements.view(np.float32)
        return (elements.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def site(tiny_llama: Path, engines: Engines, request: pytest.FixtureRequest) -> Iterator[Site]:
    options: dict[str, Any] = {"dtype": request.param, "new_tokens": NEW}
    with Place(tiny_llama, {"inside": "on"}) as place:
        place.use_disk()
        engine = place.engine(**options)
        plain = engines.plain(tiny_llama, **options)
        place.await_ready(engine)
        yield Site(place, engine, plain, request.param)


@pytest.mark.parametrize("at", [40, 128 + 7, 128 + 50, 256 + 17, LENGTH])
def test_another_question_about_the_same_document(site: Site, texts: Texts, at: int) -> None:
    document, question = texts.of(LENGTH, 140)
    site.store(document)
    prompt = [*document[:at], *question]
    answer, loaded, how = site.ask(prompt)
    # Of the tail all, where the prompt has all of what was asked; its answer is another one.
    assert loaded == whole_chunks(at) + at % CHUNK // 16 * 16
    assert how == "sync"
    site.check(prompt, answer)
    site.place.check()


def test_the_next_turn_of_a_chat(site: Site, texts: Texts) -> None:
    chat, turn = texts.of(LENGTH, 150)
    known = site.store(chat)
    assert len(known) == LENGTH + NEW - 1
    prompt = [*known, *turn]
    answer, loaded, how = site.ask(prompt)
    assert (loaded, how) == (len(known), "sync"), "all that is known, to the last token"
    site.check(prompt, answer)
    site.place.check()


def test_out_of_a_chunk_that_lies_on_disk(site: Site, texts: Texts) -> None:
    document, question = texts.of(LENGTH, 140)
    site.store(document)
    site.place.flush()
    site.place.node.clear(tiers=["host"])
    prompt = [*document[: 128 + 50], *question]
    answer, loaded, how = site.ask(prompt)
    assert (loaded, how) == (128 + 48, "async")
    site.check(prompt, answer)
    site.place.check()


def test_two_that_part_from_the_same_chunk_at_once(site: Site, texts: Texts) -> None:
    document, *questions = texts.of(LENGTH, 140, 150)
    site.store(document)
    prompts = [[*document[:178], *question] for question in questions]
    answers = site.engine.answers(prompts, in_turn=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        site.check(prompt, answer)
    site.place.check()


@pytest.mark.parametrize("site", ["float32"], indirect=True)
def test_the_next_turn_of_a_chat_after_everything_was_started_anew(
    site: Site, texts: Texts
) -> None:
    """The last one of this site: its engine and its node end here."""
    chat, turn = texts.of(LENGTH, 150)
    known = site.store(chat)
    site.place.flush()
    site.place.end()
    again = site._replace(engine=site.place.engine(dtype=site.dtype, new_tokens=NEW))
    again.place.await_ready(again.engine)
    prompt = [*known, *turn]
    answer, loaded, how = again.ask(prompt)
    assert (loaded, how) == (len(known), "async"), "all that is known, to the last token"
    again.check(prompt, answer)
    again.place.check()
