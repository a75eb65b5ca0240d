"""From requests to what a router compares."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import UsageError
from kvstrata.routing import Prompt, prompt_of_request, prompt_of_tokens
from kvstrata.routing.prompts import CHUNK_TOKENS, MAX_KEYS

TEXT = "The quick brown fox jumps over the lazy dog. " * 100


def shared_chunks(one: Prompt, two: Prompt) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one.keys, two.keys, strict=False)) if a != b),
        min(len(one.keys), len(two.keys)),
    )


def test_token_ids_have_a_key_for_each_whole_chunk() -> None:
    tokens = list(range(3 * CHUNK_TOKENS + 5))
    found = prompt_of_tokens(tokens)
    assert (len(found.keys), found.num_tokens) == (3, len(tokens))
    other = prompt_of_tokens([*tokens[:300], 7, *tokens[301:]])
    assert shared_chunks(found, other) == 1
    assert prompt_of_request({"prompt": tokens}).keys == prompt_of_tokens(tokens, None, None).keys  # type: ignore[arg-type]


def test_models_and_salts_have_nothing_in_common() -> None:
    bodies = [{"prompt": TEXT}, {"prompt": TEXT, "model": "m"}, {"prompt": TEXT, "cache_salt": "m"},
              {"prompt": TEXT, "model": "n"}]  # fmt: skip
    assert len({prompt_of_request(body).keys[0] for body in bodies}) == 4
    again = prompt_of_request({"prompt": TEXT, "model": "m", "temperature": 1})
    assert again == prompt_of_request(bodies[1])


def test_the_next_turn_of_a_chat_begins_with_the_one_before() -> None:
    chat = [{"role": "system", "content": TEXT}, {"role": "user", "content": TEXT}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    one = prompt_of_request({"messages": chat, "tools": tools})
    longer = [*chat, {"role": "assistant", "content": "yes"}, {"role": "user", "content": TEXT}]
    two = prompt_of_request({"messages": longer, "tools": tools})
    assert shared_chunks(one, two) == len(one.keys) >= 8
    other = [chat[0], {"role": "user", "content": "no " + TEXT}]
    assert 4 <= shared_chunks(one, prompt_of_request({"messages": other, "tools": tools})) < 6
    assert shared_chunks(one, prompt_of_request({"messages": chat})) == 0


def test_the_bytes_of_an_image_are_no_tokens() -> None:
    def chat(image: str) -> Prompt:
        parts = [{"type": "image_url", "image_url": {"url": f"data:{image}"}},
                 {"type": "text", "text": TEXT}]  # fmt: skip
        return prompt_of_request({"messages": [{"role": "user", "content": parts}]})

    one = chat("a" * 1_000_000)
    assert one.num_tokens < 2 * len(TEXT) / 4
    assert one == chat("a" * 1_000_000)
    assert shared_chunks(one, chat("b" * 1_000_000)) == 0


def test_of_several_prompts_the_first_decides_and_all_count() -> None:
    one = prompt_of_request({"prompt": [TEXT, "x" * 400]})
    assert one.keys == prompt_of_request({"prompt": TEXT}).keys
    assert one.num_tokens == prompt_of_request({"prompt": TEXT}).num_tokens + 100
    ids = prompt_of_request({"prompt": [[1] * 300, [2] * 300]})
    assert (len(ids.keys), ids.num_tokens) == (1, 600)


def test_a_very_long_prompt_is_looked_at_only_so_far() -> None:
    found = prompt_of_request({"prompt": "x" * (MAX_KEYS + 9) * 1024})
    assert (len(found.keys), found.num_tokens) == (MAX_KEYS, (MAX_KEYS + 9) * 256)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional={
    name: JSON for name in ("prompt", "messages", "tools", "model", "cache_salt")
}))  # fmt: skip
def test_whatever_was_sent_is_some_prompt(body: dict[str, Any]) -> None:
    found = prompt_of_request(body)
    assert found.num_tokens >= 1
    assert prompt_of_request(json.loads(json.dumps(body))) == found


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], [1.5], ["a"], [None]])
def test_what_is_no_token_id_is_an_error(tokens: list[Any]) -> None:
    with pytest.raises(UsageError, match="token ids"):
        prompt_of_tokens(tokens)
