"""Our hashes of pages are SGLang's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.pagekeys import page_hashes, page_seed

salts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=300),
    size=st.sampled_from([1, 16, 64, 128]),
    extra_key=salts,
    salt=salts,
)
def test_hashes_are_sglangs_own(
    tokens: list[int], size: int, extra_key: str | None, salt: str | None
) -> None:
    from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

    seed = storage_namespace_seed(extra_key, salt)
    assert page_seed(extra_key, salt).hex() == (seed or "")
    whole = tokens[: len(tokens) // size * size]
    theirs = get_hash_str(whole, seed, page_size=size) if whole else []
    assert [one.hex() for one in page_hashes(tokens, size, page_seed(extra_key, salt))] == theirs
