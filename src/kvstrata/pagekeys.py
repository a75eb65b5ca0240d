"""Keys of pages: SGLang's chain of page hashes, kept apart by namespace and secret.

SGLang names a page by a hash of all tokens up to its end, and by nothing else: not the model, nor
its weights, dtype or ranks. ``docs/keys.md`` is the page of this code, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from blake3 import blake3

from kvstrata.errors import UsageError
from kvstrata.keys import KEY_BYTES, KeyChain, MediaItem, Tokens, token_ids
from kvstrata.secret import SECRET_BYTES

HASH_BYTES = 32

_CONTEXT = "KVStrata 1 page keys"
_SEED = b"sglang-cache-namespace-v1"


class PageKeys:
    """Keys of one namespace's pages. Stateless after construction, so threads may share it.

    Args:
        secret: the deployment's, 32 bytes, see `kvstrata.secret.load_secrets`.
        namespace: ``Namespace.digest()``.
    Raises:
        UsageError: a wrong length.
    """

    def __init__(self, secret: bytes, namespace: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"secret of {len(secret)} bytes, not {SECRET_BYTES}")
        if len(namespace) != KEY_BYTES:
            raise UsageError(f"namespace digest of {len(namespace)} bytes, not {KEY_BYTES}")
        key = blake3(secret, derive_key_context=_CONTEXT).digest()
        self._hasher = blake3(key=key, max_threads=1)
        self._namespace = bytes(namespace)

    def of(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The keys of pages with these hashes, 32 bytes each; about 1 us a page.

        Raises:
            UsageError: a hash is not 32 bytes long.
        """
        keys, hasher, namespace = [], self._hasher.copy(), self._namespace
        for page in hashes:
            if len(page) != HASH_BYTES:
                raise UsageError(f"page hash of {len(page)} bytes, not {HASH_BYTES}")
            hasher.reset()
            hasher.update(namespace + page)
            keys.append(hasher.digest())
        return keys


class PageChain(KeyChain):
    """Keys of a prompt's pages, in the place of its chunks' keys.

    A page's key is not made of the key before it, so this remembers the hashes of one prompt's
    pages: one for each prompt, and on one thread. Tails and marks are no pages: they have a
    `KeyChain`'s keys, behind the key of the page before them.

    Args:
        secret, namespace, chunk_tokens: as of a `KeyChain`.
        salt: the request's; None or empty if it has none.
    Raises:
        UsageError: as a `KeyChain` does.
    """

    def __init__(
        self, secret: bytes, namespace: bytes, chunk_tokens: int, salt: str | None = None
    ) -> None:
        super().__init__(secret, namespace, chunk_tokens, salt or "")
        self._seed = page_seed(salt=salt or None)
        self._pages = PageKeys(secret, namespace)
        self._hashes: dict[bytes, bytes] = {}

    def keys(
        self,
        tokens: Tokens,
        media: Sequence[MediaItem] = (),
        start: int = 0,
        parent: bytes | None = None,
    ) -> list[bytes]:
        """As of a `KeyChain`.

        Raises:
            UsageError: as there; or the prompt has media, or the key before ``start`` is not one
                that this has made since it last began at 0.
        """
        self._parent_key(start, parent)
        if media:
            raise UsageError("a page's key has no media in it")
        if parent is None:
            self._hashes.clear()
            before = self._seed
        elif parent in self._hashes:
            before = self._hashes[parent]
        else:
            raise UsageError("a page behind one that has no hash here")
        hashes = page_hashes(tokens, self.chunk_tokens, before)
        keys = self._pages.of(hashes)
        self._hashes.update(zip(keys, hashes, strict=True))
        return keys


def chain_of(
    secret: bytes, namespace: bytes, chunk_tokens: int, salt: str = "", *, pages: bool
) -> KeyChain:
    """What makes the keys of one prompt.

    Args:
        secret, namespace, chunk_tokens, salt: as of a `KeyChain`.
        pages: whether the namespace's keys are those of pages, as ``Namespace.pages`` says.
    Raises:
        UsageError: as a `KeyChain` does.
    """
    return (PageChain if pages else KeyChain)(secret, namespace, chunk_tokens, salt)


def page_hashes(tokens: Tokens, page_tokens: int, before: bytes = b"") -> list[bytes]:
    """SGLang's hashes of the whole pages of ``tokens``; what is left over has none.

    Args:
        tokens: ids, each 0 to 2^31 - 1.
        page_tokens: tokens of a page.
        before: hash of the page before them; of the first page `page_seed`.
    Raises:
        UsageError: an id out of range, or a size below 1.
    """
    if page_tokens < 1:
        raise UsageError(f"pages of {page_tokens} tokens: expected at least 1")
    ids = token_ids(tokens)
    whole = len(ids) // page_tokens
    rows = memoryview(np.ascontiguousarray(ids[: whole * page_tokens], "<u4").tobytes())
    hashes, nbytes = [], 4 * page_tokens
    for number in range(whole):
        before = hashlib.sha256(before + rows[number * nbytes : (number + 1) * nbytes]).digest()
        hashes.append(before)
    return hashes


def page_seed(extra_key: str | None = None, salt: str | None = None) -> bytes:
    """What SGLang chains a prompt's first page to: nothing, unless the request is set apart.

    Args:
        extra_key: SGLang's; the id of an adapter ends it.
        salt: the request's ``cache_salt``; "" is one, too.
    Raises:
        UsageError: a text that UTF-8 cannot encode.
    """
    if extra_key is None and salt is None:
        return b""
    digest = hashlib.sha256(_SEED)
    for part in (extra_key, salt):
        if part is None:
            digest.update(b"\0")
            continue
        try:
            encoded = part.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{part!r} cannot be encoded in UTF-8: {error.reason}") from error
        digest.update(b"\1" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()
