"""From a request to what a router compares: keys of its leading chunks.

A router has no tokenizer. Token ids count four bytes each, text in UTF-8 counts a token for four
bytes, and a chunk is a kilobyte of either, so that both give a key for about 256 tokens. A chat is
its messages one after the other, so its next turn begins with the same bytes.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from kvstrata.errors import UsageError
from kvstrata.routing.base import Prompt

BYTES_PER_TOKEN = 4
CHUNK_TOKENS = 256
CHUNK_BYTES = BYTES_PER_TOKEN * CHUNK_TOKENS
MAX_KEYS = 2048
"""Chunks that are looked at; what is behind half a million tokens says nothing more."""
KEY_BYTES = 16


def prompt_of_tokens(tokens: Sequence[int], model: str = "", salt: str = "") -> Prompt:
    """A prompt of token ids.

    Args:
        tokens: ids from 0 to 2^32 - 1.
        model: prompts of different models have no key in common.
        salt: nor have those of different salts.
    Raises:
        UsageError: something else than such ids.
    """
    return _prompt(_of_tokens(tokens), _start(model, salt))


def prompt_of_request(body: Mapping[str, Any]) -> Prompt:
    """The prompt of a request to ``/v1/completions`` or ``/v1/chat/completions``.

    Never fails: of what an engine will refuse anyway, some prompt is made. Of several prompts in
    one request the first one decides, and all count.

    Args:
        body: as JSON gave it.
    """
    start = _start(body.get("model"), body.get("cache_salt"))
    if "messages" in body:
        return _prompt(b"".join(_of_chat(body)), start)
    given = body.get("prompt")
    several = given if isinstance(given, list) and given and _is_prompt(given[0]) else [given]
    first, *others = [_of_one(prompt) for prompt in several]
    return _prompt(first, start, sum(map(len, others)))


def _is_prompt(value: object) -> bool:
    return isinstance(value, (str, list))


def _start(model: object, salt: object) -> bytes:
    return blake3(_text([model, salt])).digest(KEY_BYTES)


def _of_one(prompt: object) -> bytes:
    if isinstance(prompt, str):
        return _utf8(prompt)
    if isinstance(prompt, list):
        try:
            return _of_tokens(prompt)
        except UsageError:
            pass
    return _text(prompt)


def _of_tokens(tokens: Sequence[int]) -> bytes:
    try:
        return array("I", tokens).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"token ids: {error}") from error


def _of_chat(body: Mapping[str, Any]) -> Iterator[bytes]:
    """What a chat's template puts in front, then message after message."""
    yield _text(body.get("tools"))
    messages = body["messages"]
    if not isinstance(messages, list):
        yield _text(messages)
        return
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            yield _text(message)
            continue
        yield _text({**message, "content": [_part(part) for part in content]})


def _part(part: object) -> object:
    """Text as it is; of an image or a sound a digest, for its bytes are no tokens."""
    if isinstance(part, dict) and part.get("type") != "text":
        return blake3(_text(part)).hexdigest()
    return part


def _text(value: object) -> bytes:
    return _utf8(json.dumps(value, sort_keys=True, ensure_ascii=False))


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _prompt(data: bytes, start: bytes, more_bytes: int = 0) -> Prompt:
    keys = []
    key = start
    for number in range(min(len(data) // CHUNK_BYTES, MAX_KEYS)):
        chunk = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        key = blake3(key + chunk).digest(KEY_BYTES)
        keys.append(key)
    num_tokens = -(-(len(data) + more_bytes) // BYTES_PER_TOKEN)
    return Prompt(tuple(keys), CHUNK_TOKENS, max(num_tokens, 1))
