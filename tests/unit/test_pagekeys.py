"""Keys of pages: SGLang's hashes as written down, kept apart by secret and namespace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.cli.registered import keyed
from kvstrata.errors import UsageError
from kvstrata.fleet.members import Member, Model
from kvstrata.keys import KeyChain, MediaItem, Namespace
from kvstrata.pagekeys import PageChain, PageKeys, chain_of, page_hashes, page_seed

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
SPACE = Namespace("a-model", "a layout", 4, pages=True)

ids = st.lists(st.integers(0, 2**31 - 1), max_size=60)
salts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

# Made by SGLang 0.5.23 itself (sglang.srt.mem_cache.utils.get_storage_hash_str) of the tokens
# 0, 1, 2, ... 9 in pages of 4, the whole ones; by extra key and salt.
GOLDEN: dict[tuple[str | None, str | None], list[str]] = {
    (None, None): [
        "baed642339816affb3fe8719792d0e4ce82f12db72b7373d244eaa65445800fe",
        "01414b052706d93bd0f1f1646c0e8ca2fa8ef5efd7bcc99f7a1cee8eb11ad052",
    ],
    (None, "alice"): [
        "7f3535c770eb3a547ebe73c5b377e333dfad0d0b4b9260c2e29b2b115aecb15a",
        "5222225db62857014c65b113646e76db9826228713bc753b7451caa01b241037",
    ],
    ("lora-1", None): [
        "4c74ce452ee2076f9bae29b40387ec5f54f21297a12d513d1f1e2d538377cf71",
        "9f3b8205feabef5bba56eab937e5ab33ea34577a21157a80895843b086cb9b13",
    ],
    ("lora-1", "alice"): [
        "c42aad48c7a691f99f73269abda95252f00536e1b1b7c9781ce0fc0ad956d63e",
        "b797eb53dea34b864f2fb1f1cdb49fab310f0dd599cc9e72ec62f3850e46be57",
    ],
    ("", ""): [
        "863217e0443afd308235162aeddf48db53fbe6e585675796de22194a352efc75",
        "bbe3ff3c2e9380321105596625fd7536e96bdd10464ac48187b0b6fe693e9cc9",
    ],
}


def written_down(tokens: list[int], size: int, seed: bytes) -> list[bytes]:
    """As docs/keys.md has it, a token at a time."""
    hashes, before = [], seed
    for first in range(0, len(tokens) - size + 1, size):
        digest = hashlib.sha256(before)
        for token in tokens[first : first + size]:
            digest.update(token.to_bytes(4, "little"))
        before = digest.digest()
        hashes.append(before)
    return hashes


@pytest.mark.parametrize(("extra_key", "salt"), GOLDEN)
def test_what_sglang_itself_made(extra_key: str | None, salt: str | None) -> None:
    seed = page_seed(extra_key, salt)
    found = page_hashes(range(10), 4, seed)
    assert [one.hex() for one in found] == GOLDEN[extra_key, salt]


@given(tokens=ids, size=st.integers(1, 20), cut=st.integers(0, 20))
def test_hashes_are_as_written_down_and_go_on_anywhere(
    tokens: list[int], size: int, cut: int
) -> None:
    whole = page_hashes(tokens, size)
    assert whole == written_down(tokens, size, b"")
    assert page_hashes(np.array(tokens, np.int64), size) == whole
    done = min(cut, len(whole))
    before = whole[done - 1] if done else b""
    assert page_hashes(tokens[done * size :], size, before) == whole[done:]


@given(one=st.tuples(salts, salts), other=st.tuples(salts, salts))
def test_seeds_are_equal_only_where_all_is(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    assert (page_seed(*one) == page_seed(*other)) is (one == other)
    assert (page_seed(*one) == b"") is (one == (None, None))


def test_keys_depend_on_secret_and_namespace() -> None:
    hashes, digest = page_hashes(range(12), 4), SPACE.digest()
    keys = PageKeys(SECRET, digest).of(hashes)
    assert len({*keys}) == 3
    assert PageKeys(SECRET, digest).of(hashes[1:]) == keys[1:]
    for secret, space in ((OTHER, digest), (SECRET, Namespace("m", "l", 4, pages=True).digest())):
        assert not {*keys} & {*PageKeys(secret, space).of(hashes)}
    assert not {*keys} & {*KeyChain(SECRET, digest, 4).keys(range(12))}


@given(tokens=ids, cuts=st.lists(st.integers(0, 60), max_size=4), salt=salts)
def test_a_chain_goes_on_from_any_of_its_keys(
    tokens: list[int], cuts: list[int], salt: str | None
) -> None:
    digest = SPACE.digest()
    wanted = PageKeys(SECRET, digest).of(page_hashes(tokens, 4, page_seed(salt=salt or None)))
    chain = PageChain(SECRET, digest, 4, salt)
    keys: list[bytes] = []
    for cut in (*sorted(cuts), len(tokens)):
        known = len(keys) // 2  # some are asked for again
        parent = keys[known - 1] if known else None
        end = max(cut, known * 4)
        keys = keys[:known] + chain.keys(tokens[known * 4 : end], (), known * 4, parent)
        assert keys == wanted[: len(keys)]
    assert keys == wanted


def test_tails_and_marks_are_those_of_chunks_behind_a_page() -> None:
    digest, tokens = Namespace("m", "l", 32, pages=True).digest(), list(range(50))
    pages, chunks = PageChain(SECRET, digest, 32, "a"), KeyChain(SECRET, digest, 32, "a")
    (page,) = pages.keys(tokens)
    assert page != chunks.keys(tokens)[0]
    assert pages.tail(tokens[32:], (), 32, page) == chunks.tail(tokens[32:], (), 32, page)
    assert pages.marks(tokens[32:], [page], (), 32) == chunks.marks(tokens[32:], [page], (), 32)


def test_what_has_no_page_key_is_refused() -> None:
    digest = SPACE.digest()
    chain = PageChain(SECRET, digest, 4)
    first, _ = chain.keys(range(8))
    with pytest.raises(UsageError, match="no media"):
        chain.keys(range(8), [MediaItem("an image", 0, 4)])
    with pytest.raises(UsageError, match="has no hash here"):
        chain.keys(range(4), (), 4, bytes(32))
    with pytest.raises(UsageError, match="must be given together"):
        chain.keys(range(4), (), 4)
    chain.keys(range(1, 9))
    with pytest.raises(UsageError, match="has no hash here"):
        chain.keys(range(4), (), 4, first)
    for wrong in (
        lambda: PageKeys(bytes(31), digest),
        lambda: PageKeys(SECRET, bytes(31)),
        lambda: PageKeys(SECRET, digest).of([bytes(31)]),
        lambda: page_hashes([1], 0),
        lambda: page_hashes([-1], 4),
        lambda: page_seed(salt="\ud800"),
    ):
        with pytest.raises(UsageError):
            wrong()


@pytest.mark.parametrize("pages", [False, True])
def test_whoever_asks_for_a_prompt_makes_the_namespaces_keys(tmp_path: Path, pages: bool) -> None:
    space = Namespace("a-model", "a layout", 4, pages=pages)
    chain = chain_of(SECRET, space.digest(), 4, "alice", pages=pages)
    assert type(chain) is (PageChain if pages else KeyChain)
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps([*range(10)]))
    told = Model(space.digest().hex(), "a-model", 4, pages=pages)
    member = Member("a", 1, "0", 2, 1, models=[told])
    assert keyed([member], SECRET, file, None, "alice").keys == chain.keys(range(10))
