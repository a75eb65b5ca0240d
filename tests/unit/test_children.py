"""What begins alike, against a plain dict: random objects that come, go and are of use."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.header import MARK_BYTES
from kvstrata.keys import KeyChain
from kvstrata.node.common.children import MAX_ALIKE, Child, Children

CHUNK = 64
CHAIN = KeyChain(bytes(32), bytes(32), CHUNK)
MOST = 8


def marks_of(tokens: Sequence[int], parent: bytes | None = None) -> bytes:
    """Of an object that begins with a prompt, or follows a parent."""
    (marks,) = CHAIN.marks(tokens, [parent], start=CHUNK if parent else 0)
    return marks


def in_common(these: Sequence[int], those: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    pairs = zip(these, those, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other),
                min(len(these), len(those)))  # fmt: skip


# Of few tokens, so that objects often begin alike and part anywhere.
objects = st.lists(st.sampled_from([1, 2]), min_size=0, max_size=4).flatmap(
    lambda pieces: st.integers(1, CHUNK).map(
        lambda length: tuple([t for piece in pieces for t in [piece] * 16] + [3] * CHUNK)[:length]
    )
)
acts = st.lists(
    st.tuples(st.sampled_from(["enter", "enter", "enter", "leave", "use", "ask"]), objects),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(acts)
def test_as_a_plain_dict(history: list[tuple[str, tuple[int, ...]]]) -> None:
    children, plain = Children(MOST), dict[tuple[int, ...], None]()
    for act, tokens in history:
        key, marks = repr(tokens).encode(), marks_of(tokens)
        if act == "enter" and len(tokens) >= 16:
            children.enter(key, len(tokens), CHUNK, marks)
            plain.setdefault(tokens)
            if len(plain) > MOST:
                del plain[next(iter(plain))]
        elif act == "enter":
            children.enter(key, len(tokens), CHUNK, marks)  # too short to be found
        elif act == "leave":
            children.leave(key)
            plain.pop(tokens, None)
        elif act == "use":
            children.use(key)
            if tokens in plain:
                del plain[tokens]
                plain[tokens] = None
        children.check_integrity()
        assert len(children) == len(plain)
        assert (key in children) == (tokens in plain)
        expected = {
            Child(repr(one).encode(), len(one), good, len(one) < CHUNK)
            for one in plain
            if (good := in_common(one, tokens) // 16 * 16)
        }
        found = children.alike(marks)
        assert set(found) == expected
        assert len(found) == len(expected)
        order = [(-child.good_tokens, not child.may_be_whole) for child in found]
        assert order == sorted(order)
        begun = {
            repr(one).encode()
            for one in plain
            if len(one) // 16 * 16 == in_common(one, tokens) // 16 * 16
            and len(one) < min(len(tokens), CHUNK)
        }
        assert set(children.tails_begun(key)) == (begun if tokens in plain else set())


def test_the_latest_of_equals_comes_first() -> None:
    children = Children()
    keys = [bytes([i]) * 32 for i in range(3)]
    for key in keys:
        children.enter(key, CHUNK, CHUNK, marks_of(range(CHUNK)))
    assert [child.key for child in children.alike(marks_of(range(32)))] == keys[::-1]
    children.use(keys[0])
    found = [child.key for child in children.alike(marks_of(range(32)))]
    assert found == [keys[0], keys[2], keys[1]]


def test_of_one_beginning_so_many_are_remembered() -> None:
    children = Children()
    for number in range(MAX_ALIKE + 5):
        children.enter(number.to_bytes(32, "big"), CHUNK, CHUNK, marks_of(range(CHUNK)))
        children.check_integrity()
    found = {child.key for child in children.alike(marks_of(range(CHUNK)))}
    assert found == {number.to_bytes(32, "big") for number in range(5, MAX_ALIKE + 5)}


def test_what_is_learnt_later_counts() -> None:
    children = Children()
    children.enter(bytes(32), CHUNK, CHUNK, marks_of(range(CHUNK)))
    children.enter(bytes(32), CHUNK, CHUNK, marks_of(range(1, CHUNK + 1)))
    children.check_integrity()
    assert not children.alike(marks_of(range(CHUNK)))
    assert children.alike(marks_of(range(1, CHUNK + 1)))


def test_a_parent_and_a_salt_are_part_of_the_beginning() -> None:
    children = Children()
    children.enter(bytes(32), CHUNK, CHUNK, marks_of(range(CHUNK)))
    other = KeyChain(bytes(32), bytes(32), CHUNK, "alice").marks(range(CHUNK), [None])[0]
    assert children.alike(marks_of(range(CHUNK)))
    assert not children.alike(marks_of(range(CHUNK), b"p" * 32))
    assert not children.alike(other)
    assert not children.alike(b"")


@pytest.mark.parametrize("seed", range(5))
def test_marks_that_differ_somewhere_count_up_to_there(seed: int) -> None:
    """Whatever lies behind the first difference, equal or not, is not good."""
    rng = random.Random(seed)
    marks = [rng.randbytes(MARK_BYTES) for _ in range(8)]
    children = Children()
    children.enter(bytes(32), 128, 128, b"".join(marks))
    for place in range(1, 8):
        other = [*marks[:place], rng.randbytes(MARK_BYTES), *marks[place + 1 :]]
        assert children.alike(b"".join(other))[0].good_tokens == 16 * place
    assert children.alike(b"".join(marks[:3]))[0].good_tokens == 48
    children.clear()
    assert not children.alike(b"".join(marks))
