"""Keys follow docs/keys.md to the byte, and everything that matters changes them."""

from __future__ import annotations

import dataclasses
import doctest
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import UsageError
from kvstrata.keys import KeyChain, MediaItem, Namespace, owner_digest
from kvstrata.wire.protocol import split

SECRET = bytes(range(32))
NAMESPACE = Namespace(model="5f3a", layout="full/30x3x64x2/bfloat16", chunk_tokens=4)
CHAIN = KeyChain(SECRET, NAMESPACE.digest(), 4)

small_tokens = st.lists(st.integers(0, 2**31 - 1), max_size=30)
items = st.builds(
    MediaItem, identifier=st.text("ab", max_size=2), offset=st.integers(0, 30),
    length=st.integers(1, 12),
)  # fmt: skip
namespaces = st.builds(
    Namespace,
    model=st.text("ab", min_size=1, max_size=3),
    layout=st.text("ab", min_size=1, max_size=3),
    chunk_tokens=st.integers(1, 12),
    tensor_parallel=st.integers(1, 12),
    pipeline_parallel=st.integers(1, 12),
    context_parallel=st.integers(1, 12),
    adapter=st.text("ab", max_size=3),
    tenant=st.text("ab", max_size=3),
    selection=st.text("ab", max_size=3),
)
namespaces |= st.builds(
    lambda one, slices: dataclasses.replace(one, tensor_parallel=1, slices=slices),
    namespaces,
    st.integers(1, 12),
)


def by_the_page(
    tokens: list[int], media: list[MediaItem], salt: str = "", tail: bool = False
) -> list[bytes]:
    """The chain as docs/keys.md words it, one piece at a time; with the key of its tail."""
    hash_key = blake3(SECRET + salt.encode(), derive_key_context="KVStrata 1 chunk keys").digest()
    key, keys = NAMESPACE.digest(), []
    for start in range(0, len(tokens) if tail else len(tokens) - 3, 4):
        some = tokens[start : start + 4]
        message = key + struct.pack("<I", len(some))
        message += b"".join(struct.pack("<I", token) for token in some)
        inside = [
            item
            for item in sorted(media, key=lambda item: (item.offset, item.length, item.identifier))
            if item.offset < start + 4 and item.offset + item.length > start
        ]
        message += struct.pack("<I", len(inside))
        for item in inside:
            name = item.identifier.encode()
            message += struct.pack("<I", len(name)) + name
            message += struct.pack("<qQ", item.offset - start, item.length)
        key = blake3(message, key=hash_key).digest()
        keys.append(key)
    return keys


def test_an_owner_is_a_tenant_and_a_salt_and_tells_neither() -> None:
    secrets = [bytes(32), b"s" * 32]
    names = [("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("a", "")]
    digests = {owner_digest(secret, *name) for secret in secrets for name in names}
    assert len(digests) == len(secrets) * len(names)
    assert {len(digest) for digest in digests} == {16}


def test_examples_of_the_keys_page_are_true() -> None:
    path = Path(__file__).parents[2] / "docs/keys.md"
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "keys.md", str(path), 0)
    assert len(test.examples) >= 14
    output: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert not output, "".join(output)


@given(small_tokens, st.lists(items, max_size=4), st.sampled_from(["", "alice", "ü"]))
def test_chain_is_the_pages(tokens: list[int], media: list[MediaItem], salt: str) -> None:
    chain = KeyChain(SECRET, NAMESPACE.digest(), 4, salt)
    assert chain.keys(tokens, media) == by_the_page(tokens, media, salt)


@given(small_tokens, st.lists(items, max_size=4), st.integers(1, 7))
def test_extending_equals_starting_over(
    tokens: list[int], media: list[MediaItem], chunks: int
) -> None:
    whole, start = CHAIN.keys(tokens, media), chunks * 4
    if len(whole) < chunks:
        return
    rest = CHAIN.keys(tokens[start:], media, start=start, parent=whole[chunks - 1])
    assert rest == whole[chunks:]


@given(small_tokens, small_tokens)
def test_keys_agree_exactly_as_far_as_tokens_do(one: list[int], other: list[int]) -> None:
    pairs = list(zip(CHAIN.keys(one), CHAIN.keys(other), strict=False))
    for chunk, (key, its) in enumerate(pairs):
        end = (chunk + 1) * 4
        assert (key == its) == (one[:end] == other[:end])


@given(small_tokens.filter(len), st.data())
def test_any_changed_token_changes_all_keys_from_there(tokens: list[int], data: Any) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[at] ^= 1
    before, after = CHAIN.keys(tokens), CHAIN.keys(changed)
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        chunk < at // 4 for chunk in range(len(before))
    ]


def test_media_enters_every_chunk_it_overlaps_and_no_other() -> None:
    def bare(chunk: int, media: list[MediaItem]) -> bytes:
        """The key of one chunk under a fixed parent, so that only its own hash shows."""
        return CHAIN.keys([7] * 4, media, start=4 * chunk, parent=bytes(32))[0]

    image = MediaItem("image", offset=7, length=6)  # tokens 7 to 12: chunks 1, 2, 3
    touched = [bare(chunk, [image]) != bare(chunk, []) for chunk in range(1, 6)]
    assert touched == [True, True, True, False, False]


@pytest.mark.parametrize(
    "other",
    [MediaItem("other", 2, 3), MediaItem("image", 1, 3), MediaItem("image", 2, 4)],
    ids=["identifier", "offset", "length"],
)
def test_media_differing_in_one_thing_differ(other: MediaItem) -> None:
    tokens, image = [7] * 8, MediaItem("image", 2, 3)
    assert CHAIN.keys(tokens, [image]) != CHAIN.keys(tokens, [other])
    both = [CHAIN.keys(tokens, [image, other]), CHAIN.keys(tokens, [other, image])]
    assert both[0] == both[1]
    assert both[0] not in (CHAIN.keys(tokens, [image]), CHAIN.keys(tokens, [image, image]))


@given(namespaces, namespaces)
def test_namespaces_meet_only_if_equal(one: Namespace, other: Namespace) -> None:
    assert (one.digest() == other.digest()) == (one == other)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_size_of_tensor_parallelism_has_the_digest_of_the_page(size: int) -> None:
    """As release 0.1.0 had it; what every size shares has another one, and names no size."""

    def digest(sizes: str) -> bytes:
        texts = ("kvstrata namespace 1", "m", "l", sizes, "3", "1", "128", "", "t")
        return blake3(b"".join(struct.pack("<I", len(x)) + x.encode() for x in texts)).digest()

    alone = Namespace("m", "l", 128, size, pipeline_parallel=3, tenant="t")
    assert alone.digest() == digest(str(size))
    shared = dataclasses.replace(alone, tensor_parallel=1, slices=size)
    assert shared.digest() == digest(f"shared {size}")
    with pytest.raises(UsageError, match="names no size"):
        Namespace("m", "l", 128, 2, slices=size)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Namespace)])
def test_every_field_changes_the_namespace(field: str) -> None:
    value = getattr(NAMESPACE, field)
    change: dict[str, Any] = {field: value + 1 if isinstance(value, int) else value + "x"}
    changed = dataclasses.replace(NAMESPACE, **change)
    assert changed.digest() != NAMESPACE.digest()
    assert KeyChain(SECRET, changed.digest(), 4).keys([1] * 4) != CHAIN.keys([1] * 4)


def test_secret_and_salt_change_keys() -> None:
    tokens = [1, 2, 3, 4]
    chains = [
        CHAIN,
        KeyChain(bytes(32), NAMESPACE.digest(), 4),
        KeyChain(SECRET, NAMESPACE.digest(), 4, "alice"),
        KeyChain(SECRET, NAMESPACE.digest(), 4, "bob"),
        KeyChain(SECRET, NAMESPACE.digest(), 2),
    ]
    keys = [chain.keys(tokens)[-1] for chain in chains]
    assert len(set(keys)) == len(chains)


def test_another_process_derives_the_same_keys() -> None:
    program = (
        "from kvstrata.keys import KeyChain\n"
        f"print(KeyChain({SECRET!r}, {NAMESPACE.digest()!r}, 4, 'alice').keys(range(8))[1].hex())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert said == {KeyChain(SECRET, NAMESPACE.digest(), 4, "alice").keys(range(8))[1].hex()}


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 0, 2**31 - 1, 9],
        (5, 0, 2**31 - 1, 9),
        np.array([5, 0, 2**31 - 1, 9], np.int32),
        np.array([5, 0, 2**31 - 1, 9], ">i8"),
        np.array([5, 7, 0, 7, 2**31 - 1, 7, 9, 7], np.uint64)[::2],
        [np.int64(5), 0, 2**31 - 1, 9],
    ],
    ids=["list", "tuple", "int32", "big-endian", "strided", "numpy scalars"],
)
def test_every_form_of_token_ids_has_the_same_keys(tokens: Any) -> None:
    assert CHAIN.keys(tokens) == by_the_page([5, 0, 2**31 - 1, 9], [])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, -1, 3], "token 2 is -1, not 0 to 2147483647"),
        ([1, 2**31], "token 1 is 2147483648"),
        ([1, 2**63], "token 1 is 9223372036854775808"),
        (np.array([0, 0, 0, 0, -5]), "token 4 is -5"),
        (np.array([2**31], np.uint32), "token 0 is 2147483648"),
        ([1, 2.0], "token 1 is 2.0, not a whole number"),
        ([1, None], "token 1 is None"),
        (["a"], "token 0 is 'a'"),
        (np.zeros(4), "float64: expected flat integers"),
        (np.zeros((2, 4), np.int32), r"\(2, 4\), int32"),
        (bytes(32), "raw bytes"),
    ],
    ids=repr,
)
def test_wrong_token_ids_are_named(tokens: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CHAIN.keys(tokens)


@given(small_tokens, st.lists(items, max_size=4), st.sampled_from(["", "alice"]))
def test_a_tail_is_the_pages(tokens: list[int], media: list[MediaItem], salt: str) -> None:
    chain = KeyChain(SECRET, NAMESPACE.digest(), 4, salt)
    start = len(tokens) // 4 * 4
    if start == len(tokens):
        return
    keys = chain.keys(tokens, media)
    tail = chain.tail(tokens[start:], media, start, keys[-1] if keys else None)
    assert [*keys, tail] == by_the_page(tokens, media, salt, tail=True)


def test_a_tail_is_no_chunk_and_no_other_tail() -> None:
    tails = [CHAIN.tail([1, 2, 3][:count]) for count in (1, 2, 3)]
    assert len({*tails, *CHAIN.keys([1, 2, 3, 0]), *CHAIN.keys([1, 2, 3, 4])}) == 5
    for wrong in ([], [1, 2, 3, 4]):
        with pytest.raises(UsageError, match="expected 1 to 3"):
            CHAIN.tail(wrong)
    with pytest.raises(UsageError, match="given together"):
        CHAIN.tail([1], start=4)


def test_less_than_a_chunk_has_no_key() -> None:
    assert CHAIN.keys([]) == CHAIN.keys(np.array([], np.int32)) == CHAIN.keys([1, 2, 3]) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": 2, "parent": bytes(32)}, "start 2 is not a multiple"),
        ({"start": -4, "parent": bytes(32)}, "start -4 is not a multiple"),
        ({"start": 4}, "must be given together"),
        ({"parent": bytes(32)}, "must be given together"),
        ({"start": 4, "parent": b"short"}, "parent of 5 bytes"),
        ({"media": [MediaItem("x", -1, 2)]}, "offset must be at least 0"),
        ({"media": [MediaItem("x", 0, 0)]}, "length at least 1"),
        ({"media": [MediaItem("\ud800", 0, 1)]}, "UTF-8"),
    ],
    ids=repr,
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CHAIN.keys([1, 2, 3, 4], **kwargs)


def test_wrong_chains_and_namespaces() -> None:
    digest = NAMESPACE.digest()
    with pytest.raises(UsageError, match="secret of 31 bytes"):
        KeyChain(bytes(31), digest, 4)
    with pytest.raises(UsageError, match="namespace digest of 64 bytes"):
        KeyChain(SECRET, digest * 2, 4)
    with pytest.raises(UsageError, match="chunk_tokens 0"):
        KeyChain(SECRET, digest, 0)
    with pytest.raises(UsageError, match="UTF-8"):
        KeyChain(SECRET, digest, 4, "\ud800")
    with pytest.raises(UsageError, match="tensor_parallel is 0"):
        dataclasses.replace(NAMESPACE, tensor_parallel=0)
    with pytest.raises(UsageError, match="model is empty"):
        dataclasses.replace(NAMESPACE, model="")
    with pytest.raises(UsageError, match="UTF-8"):
        dataclasses.replace(NAMESPACE, tenant="\udc80").digest()


MARKED = KeyChain(SECRET, NAMESPACE.digest(), 64)
pieces = st.lists(st.integers(0, 3), max_size=200)
pictures = st.builds(
    MediaItem, identifier=st.text("ab", max_size=2), offset=st.integers(0, 200),
    length=st.integers(1, 60),
)  # fmt: skip


def marks_by_the_page(tokens: list[int], media: list[MediaItem], salt: str = "") -> list[bytes]:
    """Of each chunk of 64, as docs/keys.md words it: a chain of chunks of 16 from its parent."""
    hash_key = blake3(SECRET + salt.encode(), derive_key_context="KVStrata 1 marks").digest()
    keys, found = KeyChain(SECRET, NAMESPACE.digest(), 64, salt).keys(tokens, media), []
    for start in range(0, len(tokens), 64):
        key, marks = [NAMESPACE.digest(), *keys][start // 64], b""
        for at in range(start, min(start + 64, len(tokens)) - 15, 16):
            message = key + struct.pack("<17I", 16, *tokens[at : at + 16])
            inside = [
                item
                for item in sorted(media, key=lambda i: (i.offset, i.length, i.identifier))
                if item.offset < at + 16 and item.offset + item.length > at
            ]
            message += struct.pack("<I", len(inside))
            for item in inside:
                name = item.identifier.encode()
                message += struct.pack("<I", len(name)) + name
                message += struct.pack("<qQ", item.offset - at, item.length)
            key = blake3(message, key=hash_key).digest()
            marks += key[:12]
        found.append(marks)
    return found


@given(pieces, st.lists(pictures, max_size=3), st.sampled_from(["", "alice"]), st.integers(0, 2))
def test_marks_are_the_pages(
    tokens: list[int], media: list[MediaItem], salt: str, first: int
) -> None:
    chain = KeyChain(SECRET, NAMESPACE.digest(), 64, salt)
    parents = [None, *chain.keys(tokens, media)][: -(-len(tokens) // 64)]
    expected = marks_by_the_page(tokens, media, salt)
    assert chain.marks(tokens, parents, media) == expected
    rest = chain.marks(tokens[first * 64 :], parents[first:], media, first * 64)
    assert rest == expected[first:]


@given(pieces, pieces)
def test_marks_agree_exactly_as_far_as_tokens_do(one: list[int], other: list[int]) -> None:
    same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                min(len(one), len(other)))  # fmt: skip
    marks = [MARKED.marks(tokens[:64], [None])[0] for tokens in (one, other)]
    equal = [pair[0] == pair[1] for pair in zip(*(split(one, 12) for one in marks), strict=False)]
    assert (equal.index(False) if False in equal else len(equal)) == min(same, 64) // 16


def test_marks_of_wrong_chunks_are_refused() -> None:
    with pytest.raises(UsageError, match="given together"):
        MARKED.marks(range(128), [None, None])
    with pytest.raises(UsageError, match="not a multiple"):
        MARKED.marks(range(16), [bytes(32)], start=16)
    with pytest.raises(UsageError, match="token 3 is -1"):
        MARKED.marks([1, 2, 3, -1], [None])
