"""How prompts begin: equal for equal tokens and nothing else, and who is told of whose."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.errors import UsageError
from kvstrata.heads import HEAD_BYTES, LENGTHS, MAX_HEADS, heads
from kvstrata.keys import MediaItem
from kvstrata.node.operating import kin
from kvstrata.node.operating.kin import MOST_ALIKE, Asked, Kin

SECRET = bytes(32)


def cut(digests: bytes) -> list[bytes]:
    return [digests[at : at + HEAD_BYTES] for at in range(0, len(digests), HEAD_BYTES)]


def test_golden() -> None:
    assert (
        heads(SECRET, range(40), 32).hex()
        == "20e67df83bfca6d628646bf031a8f115bbac890ee46fe6d41ae1c0d515319a29"
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1500), st.sampled_from([16, 48, 64, 128, 4096]), st.integers(0, 1500))
def test_a_head_says_the_tokens_it_is_of(length: int, chunk: int, changed: int) -> None:
    tokens = list(range(length))
    other = [token + (number == changed) for number, token in enumerate(tokens)]
    one, two = cut(heads(SECRET, tokens, chunk)), cut(heads(SECRET, other, chunk))
    lengths = (
        [chunk, *(n for n in LENGTHS if n != chunk and n <= length)] if chunk <= length else []
    )
    assert len(one) == len(two) == len(set(one)) == len(lengths) <= MAX_HEADS
    for size, mine, theirs in zip(lengths, one, two, strict=True):
        assert (mine == theirs) == (changed >= min(size, length))


def test_chunks_of_any_size_meet() -> None:
    tokens = list(range(600))
    small, large = (cut(heads(SECRET, tokens, chunk)) for chunk in (64, 256))
    assert small[0] in large
    assert large[0] in small
    assert heads(bytes([1]) * 32, tokens, 64)[:HEAD_BYTES] not in small, "keyed"


def test_images_count() -> None:
    tokens = [7] * 32
    seen = {
        heads(SECRET, tokens, 32, [MediaItem(name, offset, 4)] if name else [])
        for name, offset in (("", 0), ("a", 0), ("b", 0), ("a", 1))
    }
    assert len(seen) == 4
    outside = heads(SECRET, [*tokens, 8, 8], 32, [MediaItem("a", 32, 2)])
    assert cut(outside)[0] == cut(heads(SECRET, tokens, 32))[0]


def test_no_tokens() -> None:
    assert heads(SECRET, [1] * 15, 16) == b""
    with pytest.raises(UsageError, match="token 3"):
        heads(SECRET, [1, 2, 3, -1] * 4, 16)


def asked(number: int, owner: int = 0, tokens: int = 0) -> Asked:
    """One of a prompt with these tokens, under a key of its own."""
    head = bytes([tokens]) * HEAD_BYTES
    return Asked(number.to_bytes(32, "big"), bytes(32), bytes([owner]) * 16, head)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_only_an_owner_is_told_of_its_own(history: list[tuple[int, int, int]]) -> None:
    """Against a list; a key is one owner's and one prompt's."""
    remembered, plain = Kin(), list[Asked]()
    for number, owner, tokens in history:
        one = asked(100 * owner + 10 * tokens + number, owner, tokens)
        remembered.note(one)
        plain = [other for other in plain if other.key != one.key] + [one]
        alike = [o for o in reversed(plain) if o.heads == one.heads and o.key != one.key]
        mine = [other for other in alike if other.owner == one.owner]
        assert list(remembered.others(one, of_all=False)) == mine
        assert list(remembered.others(one, of_all=True)) == alike[: MOST_ALIKE - 1]


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kin, "MOST", 50)
    remembered, rng = Kin(), random.Random(1)
    for number in range(500):
        remembered.note(asked(number, rng.randrange(5), rng.randrange(20)))
    assert len(remembered._asked) == 50
    assert sum(map(len, remembered._alike.values())) <= 100
    assert remembered.known(asked(449).key) is None
    assert remembered.known(asked(450).key) is not None


def test_one_key_with_ever_new_heads_is_in_no_former_group() -> None:
    remembered, other = Kin(), asked(2, tokens=99)
    remembered.note(other)
    for tokens in range(100):
        remembered.note(asked(1, tokens=tokens))
    assert len(remembered._alike) == 2
    assert list(remembered.others(other, of_all=False)) == [asked(1, tokens=99)]
