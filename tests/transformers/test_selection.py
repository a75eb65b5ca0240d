"""Selected tokens: answers of a cache that never had the others, found again, never mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from tests.engine.plain import Texts
from tests.transformers.place import CHUNK, Place, eventually, greedy, load
from tests.transformers.selecting import Methods

from kvstrata.connectors.transformers import wishes
from kvstrata.connectors.transformers.ragged import cache_of
from kvstrata.errors import Incompatible, UsageError
from kvstrata.keys import KeyChain
from kvstrata.objects import HEADER_BYTES, decode, encode
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept
from kvstrata.testing.workplace import wait_ready
from kvstrata.wire.client import offsets_of

NEW = 24
HALF = {"selection": "chance", "keep": 0.5}


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Methods:
    """The methods that there are, counted."""
    made = Methods()
    monkeypatch.setattr(wishes, "selector_named", made.named)
    return made


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen3"])
def test_who_keeps_everything_answers_exactly(
    name: str, place: Place, texts: Texts, methods: Methods
) -> None:
    context, one, other = texts.of(3 * CHUNK, 40, 70)
    plain, model = load(name), load(name)
    attached = place.attach(model, selection="all", keep=1.0)
    for number, question in enumerate((one, other)):
        prompt, said = context + question, {"context": len(context)}
        assert greedy(model, prompt, NEW, kvstrata=said) == greedy(plain, prompt, NEW)
        assert attached.last.selected == ("found" if number else "made")
        assert attached.flush()
    assert methods.runs == 1
    assert attached.stats()["stored_selections"] == 1
    assert not attached.stats()["errors"]


def test_what_was_made_is_found_and_answers_alike(
    place: Place, texts: Texts, methods: Methods
) -> None:
    context, question, other = texts.of(4 * CHUNK + 30, 20, 60)
    model = load("tiny_llama")
    exact = greedy(model, context + question, NEW)
    attached = place.attach(model)
    said = {**HALF, "context": len(context)}
    made = greedy(model, context + question, NEW, kvstrata=said)
    assert made != exact
    assert attached.last.selected == "made"
    assert attached.flush()
    assert greedy(model, context + question, NEW, kvstrata=said) == made
    assert (attached.last.selected, attached.last.loaded_tokens) == ("found", 4 * CHUNK)
    greedy(model, context + other, NEW, kvstrata=said)
    assert attached.last.selected == "found"
    assert methods.runs == 1
    counts = attached.stats()
    assert (counts["selected_calls"], counts["found_selections"]) == (3, 2)


def test_nobody_is_given_what_he_did_not_ask_for(
    place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(3 * CHUNK + 20)
    model = load("tiny_llama")
    exact = greedy(model, prompt, NEW)
    attached = place.attach(model)
    selected = greedy(model, prompt, NEW, kvstrata=HALF)
    assert attached.flush()
    # Exact ones find nothing of it, and leave what they compute; then they find that.
    for known in (0, 3 * CHUNK):
        assert greedy(model, prompt, NEW) == exact
        assert (attached.last.selected, attached.last.loaded_tokens) == ("", known)
        assert attached.flush()
    # Another method, another budget: each its own, made of the exact cache that is there now.
    for other in ({**HALF, "selection": "other"}, {**HALF, "keep": 0.25}):
        greedy(model, prompt, NEW, kvstrata=other)
        assert (attached.last.selected, attached.last.loaded_tokens) == ("made", 3 * CHUNK)
    assert greedy(model, prompt, NEW, kvstrata=HALF) == selected
    assert attached.last.selected == "found"


def test_by_default_and_by_the_call(place: Place, texts: Texts, methods: Methods) -> None:
    (prompt,) = texts.of(2 * CHUNK + 20)
    model = load("tiny_llama")
    exact = greedy(model, prompt, NEW)
    attached = place.attach(model, selection="chance", keep=0.5)
    assert greedy(model, prompt, NEW) != exact
    assert attached.last.selected == "made"
    assert greedy(model, prompt, NEW, kvstrata={"selection": None}) == exact
    assert attached.last.selected == ""
    assert greedy(model, prompt, NEW, kvstrata={"selection": "all", "keep": 1}) == exact
    assert attached.last.selected == "made"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"selection": "chance"}, "keep: None"),
        ({"selection": "chance", "keep": 0}, "keep: 0"),
        ({"selection": "chance", "keep": 1.5}, "keep: 1.5"),
        ({"selection": "unknown", "keep": 0.5}, "no method 'unknown'"),
        ({**HALF, "context": -1}, "context: -1"),
        ({**HALF, "contxt": 1}, "did you mean context"),
        ({"keep": 0.5}, "of which selection"),
        ("chance", "no mapping"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error(
    said: Any, message: str, place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(20)
    model = load("tiny_llama")
    place.attach(model)
    with pytest.raises(UsageError, match=message):
        greedy(model, prompt, 1, kvstrata=said)


def test_a_chat_goes_on_from_the_deepest_that_stands_for_enough(
    place: Place, texts: Texts, methods: Methods
) -> None:
    first, more, much = texts.of(2 * CHUNK + 5, CHUNK, 6 * CHUNK)
    model = load("tiny_llama")
    attached = place.attach(model, selection="chance", keep=0.5)
    greedy(model, first, 4)
    assert attached.flush()
    greedy(model, first + more, 4)
    assert (attached.last.selected, attached.last.loaded_tokens) == ("found", 2 * CHUNK)
    # What is kept of a quarter of the prompt is not taken for its context.
    greedy(model, first + much, 4)
    assert attached.last.selected == "made"
    assert attached.flush()
    greedy(model, first + much, 4)
    assert attached.last.loaded_tokens == 8 * CHUNK
    # A context that is named is that one, and no shorter one.
    greedy(model, first + more, 4, kvstrata={"context": 3 * CHUNK})
    assert attached.last.selected == "made"


def test_a_cache_that_is_handed_on(place: Place, texts: Texts, methods: Methods) -> None:
    context, question, next_question = texts.of(3 * CHUNK, 30, 50)
    model = load("tiny_llama")
    attached = place.attach(model, selection="chance", keep=0.5)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([context + question])
    first = model.generate(ids, return_dict_in_generate=True, **options)
    assert attached.flush()
    turn = first.sequences[0].tolist() + next_question
    # The same without a cache in hand, from what is kept of the same tokens.
    expected = greedy(model, turn, 5)
    assert attached.last.selected == "found"
    handed = model.generate(torch.tensor([turn]), past_key_values=first.past_key_values, **options)
    assert handed[0].tolist() == expected
    assert attached.last.selected == "handed"
    attached.detach()
    with pytest.raises(UsageError, match="goes with no model but"):
        model.generate(torch.tensor([turn]), past_key_values=first.past_key_values, **options)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({**HALF, "context": CHUNK - 1}, "a context shorter than a chunk"),
        ({"selection": "chance", "keep": 0.0001}, "a budget of less than a token for each head"),
        ({**HALF, "selection": "too much"}, "the selection failed"),
        ({**HALF, "selection": "refusing"}, "the selection failed"),
        ({**HALF, "selection": "broken"}, "the selection failed"),
    ],
)
def test_where_it_cannot_be_the_answer_is_exact(
    said: dict[str, Any], name: str, place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(2 * CHUNK + 20)
    model = load("tiny_llama")
    exact = greedy(model, prompt, NEW)
    attached = place.attach(model)
    for known in (0, 2 * CHUNK):
        assert greedy(model, prompt, NEW, kvstrata=said) == exact
        assert (attached.last.selected, attached.last.unselected) == ("", name)
        assert attached.last.loaded_tokens == known
        assert attached.flush()
    assert attached.stats()["unselected"] == {name: 2}
    assert attached.stats()["stored_selections"] == 0


def test_what_is_kept_of_a_model_that_changes_meanwhile_is_not_stored(
    place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(2 * CHUNK + 20)
    attached = place.attach(model := load("tiny_llama"))
    greedy(model, prompt, 1, kvstrata={**HALF, "selection": "changing"})
    assert attached.last.unselected == "the model was changed meanwhile"
    assert attached.flush()
    counts = attached.stats()
    assert (counts["stored_selections"], counts["stored_chunks"]) == (0, 0)


def test_where_exact_kv_is_shared_with_engines(
    place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(3 * CHUNK + 20)
    model = load("tiny_llama")
    attached = place.attach(model, share="engines")
    exact = greedy(model, prompt, NEW)
    assert attached.flush()
    for how in ("made", "found"):
        selected = greedy(model, prompt, NEW, kvstrata=HALF)
        assert (attached.last.selected, attached.last.loaded_tokens) == (how, 3 * CHUNK)
        assert attached.flush()
    assert selected != exact
    assert greedy(model, prompt, NEW) == exact
    told = place.node.status()["namespaces"][-1]["parts"]
    assert told["pages"] is True
    assert told["selection"]


def test_threads_may_ask_at_the_same_time(place: Place, texts: Texts, methods: Methods) -> None:
    prompts = [[*texts.of(2 * CHUNK)[0], *texts.of(10)[0]] for _ in range(3)]
    model = load("tiny_llama")
    attached = place.attach(model)

    def ask(number: int) -> list[int]:
        said = HALF if number % 2 else None
        return greedy(model, prompts[number // 2], 8, **({"kvstrata": said} if said else {}))

    alone = [ask(number) for number in range(6)]
    assert attached.flush()
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, [*range(6)] * 2)) == alone * 2
    assert not attached.stats()["errors"]


@pytest.mark.parametrize(
    ("name", "says"), [("tiny_gemma3", "sliding attention"), ("tiny_llama4", "chunked attention")]
)
def test_models_without_full_attention_alone_are_refused_in_words(
    name: str, says: str, place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(2 * CHUNK + 20)
    model = load(name)
    exact = greedy(model, prompt, 4)
    with pytest.raises(Incompatible, match=says):
        place.attach(model, selection="chance", keep=0.5)
    attached = place.attach(model)
    assert greedy(model, prompt, 4, kvstrata=HALF) == exact
    assert attached.last.unselected == "the model is none for it"


def test_the_model_itself_stays_as_it_is(place: Place, texts: Texts, methods: Methods) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    (prompt,) = texts.of(2 * CHUNK + 20)
    model, other = load("tiny_llama"), load("tiny_llama")
    before = {name: id(one) for name, one in ALL_ATTENTION_FUNCTIONS.items()}
    exact = greedy(other, prompt, 4)
    attached = place.attach(model, selection="chance", keep=0.5)
    greedy(model, prompt, 4)
    after = {name: id(one) for name, one in ALL_ATTENTION_FUNCTIONS.items()}
    assert {name: after[name] for name in before} == before
    assert model.config._attn_implementation == "sdpa"
    assert greedy(other, prompt, 4) == exact
    assert "the model was changed" not in attached.stats()["bypassed"]
    # No second copy of the weights: a change in place is one of both, and another model's cache.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
        other.get_output_embeddings().weight.mul_(-1)
    exact, everything = greedy(other, prompt, 4), {"selection": "all", "keep": 1}

    def made() -> bool:
        assert greedy(model, prompt, 4, kvstrata=everything) == exact
        return attached.last.selected == "made"

    eventually(made, "its weights are hashed anew")


def test_after_a_restart_from_disk_to_the_last_bit(
    own: Place, texts: Texts, methods: Methods, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Kept] = []

    def seen(kept: Kept, device: torch.device) -> Any:
        came.append(kept)
        return cache_of(kept, device)

    monkeypatch.setattr("kvstrata.connectors.transformers.selected.cache_of", seen)
    (prompt,) = texts.of(5 * CHUNK + 20)
    own.stop_node()
    own.use_disk()
    own.start_node()
    model = load("tiny_llama", "bfloat16")
    attached = own.attach(model, selection="chance", keep=0.3)
    made = greedy(model, prompt, NEW)
    assert attached.flush()
    own.node.flush()
    (entry,) = [one for one in own.node.status()["namespaces"] if one["parts"]["selection"]]
    assert entry["parts"]["selection"] == "chance 1 context only fraction=0.3"
    own.detach()
    own.stop_node()
    own.start_node()
    wait_ready(own.node)  # it knows what is on the disk
    attached = own.attach(model, selection="chance", keep=0.3)
    assert greedy(model, prompt, NEW) == made
    assert (attached.last.selected, attached.last.loaded_tokens) == ("found", 5 * CHUNK)
    assert methods.runs == 1
    first, again = came
    assert again.equals(first)
    assert again is not first
    record = own.node.status()["requests"][-1]
    assert record["tier_tokens"] == {"disk": 5 * CHUNK}
    own.check()


CHILD = """
import json, sys
from tests.transformers.place import greedy, load
from tests.transformers.selecting import Methods
from kvstrata.connectors.transformers import attach, wishes
settings, prompt = json.load(sys.stdin)
methods = Methods()
wishes.selector_named = methods.named
model = load("tiny_llama")
with attach(model, selection="chance", keep=0.5, **settings) as attached:
    print(json.dumps([greedy(model, prompt, 24), attached.last.selected, methods.runs]))
"""


def test_another_process_finds_it(place: Place, texts: Texts, methods: Methods) -> None:
    (prompt,) = texts.of(3 * CHUNK + 50)
    model = load("tiny_llama")
    attached = place.attach(model, selection="chance", keep=0.5)
    answer = greedy(model, prompt, NEW)
    assert attached.flush()
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([place.settings, prompt]),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout.splitlines()[-1]) == [answer, "found", 0]


@pytest.mark.parametrize("selected", ["found", "made"])
def test_every_token_of_a_record_has_one_reason(
    selected: str, place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(4 * CHUNK + 50)
    model = load("tiny_llama")
    attached = place.attach(model)
    if selected == "found":
        greedy(model, prompt, 1, kvstrata={**HALF, "context": 3 * CHUNK})
    else:
        greedy(model, prompt[: 2 * CHUNK + 1], 1)
    assert attached.flush()
    greedy(model, prompt, 2, kvstrata={**HALF, "context": 3 * CHUNK})
    assert attached.last.selected == selected
    eventually(lambda: last_record(place)["tokens"] == len(prompt) + 2, "its record")
    record = last_record(place)
    loaded = (3 if selected == "found" else 2) * CHUNK
    assert record["loaded_tokens"] == loaded
    assert sum(reason["tokens"] for reason in record["reasons"]) == len(prompt) - loaded


@pytest.mark.parametrize("what", ["a position", "another boundary", "another object"])
def test_a_slot_that_holds_something_else_is_a_miss(
    what: str, place: Place, texts: Texts, methods: Methods
) -> None:
    (prompt,) = texts.of(3 * CHUNK + 20)
    model = load("tiny_llama")
    attached = place.attach(model, selection="chance", keep=0.5)
    answer = greedy(model, prompt, NEW)
    assert attached.flush()
    node = place.node
    (told,) = [one for one in node.status()["namespaces"] if one["parts"]["selection"]][-1:]
    digest = bytes.fromhex(told["digest"])
    key = KeyChain(node.hello.secret, digest, CHUNK).keys(prompt)[2]
    matched = node.match([key], [0], ["kept"]).wait(20)
    (offset,) = offsets_of(matched.offsets)
    header = decode(node.pool.view(offset, HEADER_BYTES))
    numbers = node.pool.array(offset + HEADER_BYTES, header.raw_length)[
        : k.table_bytes(header.shape)
    ].view(np.int32)
    first = header.shape[0] * header.shape[2]
    if what == "a position":
        # Another token, that goes as well with the others: only its digest tells.
        there = set(numbers[first : first + numbers[0]].tolist())
        numbers[first + numbers[0] - 1] = 3 * CHUNK - 1 - ((3 * CHUNK - 1) in there)
    else:
        changed: dict[str, dict[str, Any]] = {
            "another boundary": {"boundary": 2 * CHUNK, "start": CHUNK},
            "another object": {"key": b"k" * 32},
        }
        changes = changed[what]
        node.pool.view(offset, HEADER_BYTES)[:] = encode(replace(header, **changes))
    node.release(matched.lease)
    assert greedy(model, prompt, NEW) == answer
    assert attached.last.selected == "made"
    assert attached.last.missed.startswith("CorruptObject")
    node.clear()


def test_a_node_that_hangs(own: Place, texts: Texts, methods: Methods) -> None:
    (prompt,) = texts.of(2 * CHUNK + 20)
    model = load("tiny_llama")
    attached = own.attach(model, selection="chance", keep=0.5, **{"deadlines.request": "500ms"})
    answer = greedy(model, prompt, NEW)
    assert attached.flush()
    own.stop_still()
    try:
        assert greedy(model, prompt, NEW) == answer
        assert attached.last.missed.startswith("DeadlineExceeded")
        assert greedy(model, prompt, NEW) == answer
        assert attached.last.load_s < 0.1
        assert attached.last.selected == "made"
    finally:
        own.go_on()


def last_record(place: Place) -> dict[str, Any]:
    record: dict[str, Any] = place.node.status()["requests"][-1]
    return record


def test_a_node_that_is_killed_costs_a_miss(own: Place, texts: Texts, methods: Methods) -> None:
    (prompt,) = texts.of(3 * CHUNK)
    model = load("tiny_llama")
    attached = own.attach(model, selection="chance", keep=0.5)
    answer = greedy(model, prompt, NEW)
    assert attached.flush()
    own.kill_node()
    assert greedy(model, prompt, NEW) == answer
    assert attached.last.selected == "made"
    assert attached.stats()["errors"]


@pytest.mark.parametrize(
    ("method", "says"),
    [("evolkv", "takes a table"), ("kvpress:SnapKV", "no method"), ("snapvk", "there are")],
)
def test_methods_that_no_call_can_have(method: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        wishes.wish_of({"selection": method, "keep": 0.5})


@pytest.mark.parametrize("method", ["snapkv", "adakv", "d2o", "laq"])
def test_methods_of_the_literature(method: str, place: Place, texts: Texts) -> None:
    """Made, found, and the same; on a real model, and the one that is attached stays as it is."""
    context, question = texts.of(3 * CHUNK, 20)
    model = load("smollm2", "bfloat16")
    attached = place.attach(model)
    said = {"selection": method, "keep": 0.25, "context": len(context)}
    made = greedy(model, context + question, 4, kvstrata=said)
    assert (attached.last.selected, attached.last.unselected) == ("made", "")
    assert attached.flush()
    assert greedy(model, context + question, 4, kvstrata=said) == made
    assert (attached.last.selected, attached.last.loaded_tokens) == ("found", 3 * CHUNK)
    exact = greedy(model, context + question, 4)
    assert attached.last.selected == ""
    assert exact == greedy(load("smollm2", "bfloat16"), context + question, 4)
    assert model.config._attn_implementation == "sdpa"
