"""How prompts begin, whatever the model: digests by which a node sees that tokens were met before.

A chunk's key says under which namespace and salt tokens are stored, and nothing of any other. A
head says nothing but the tokens, so that a miss can be explained: they are there, under another
adapter. Heads are keyed with the deployment's secret, go to the node and stay in its memory: see
``docs/security.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from blake3 import blake3

from kvstrata.errors import UsageError
from kvstrata.keys import MediaItem, Tokens, media_by_chunk, token_ids

HEAD_BYTES = 16
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
"""Sizes of chunks that others may have: what they stored is found under theirs."""
MAX_HEADS = 1 + len(LENGTHS)

_CONTEXT = "KVStrata 1 heads"


def heads(
    secret: bytes, tokens: Tokens, chunk_tokens: int, media: Sequence[MediaItem] = ()
) -> bytes:
    """Digests of a prompt's first tokens: of its first chunk, and of every length in `LENGTHS`.

    Args:
        secret: the deployment's, 32 bytes; the one that stores use.
        tokens: ids from the prompt's start, as of `kvstrata.keys.KeyChain.keys`.
        chunk_tokens: tokens of a chunk.
        media: items of the prompt, as of `kvstrata.keys.KeyChain.keys`.
    Returns:
        16 bytes each, as many as the prompt is long enough for; none where it fills no chunk.
    Raises:
        UsageError: no such ids.
    """
    if len(tokens) < chunk_tokens:
        return b""
    ids = token_ids(tokens[: max(chunk_tokens, *LENGTHS)]).astype("<u4")
    hasher = blake3(key=blake3(secret, derive_key_context=_CONTEXT).digest())
    digests: dict[int, bytes] = {}
    done = 0
    for length in sorted({chunk_tokens, *LENGTHS}):
        if length > len(ids):
            break
        hasher.update(ids[done:length].tobytes())
        done = length
        number, items = media_by_chunk(media, 0, length, 1).get(0, (0, b""))
        head = hasher.copy()
        head.update(struct.pack("<II", length, number) + items)
        digests[length] = head.digest(HEAD_BYTES)
    return digests.pop(chunk_tokens) + b"".join(digests.values())


def checked_heads(heads: bytes) -> bytes:
    """Raises `UsageError` for what cannot be the heads of a prompt."""
    if len(heads) % HEAD_BYTES or len(heads) > MAX_HEADS * HEAD_BYTES:
        raise UsageError(f"{len(heads)} bytes are no heads; {HEAD_BYTES} each, {MAX_HEADS} at most")
    return heads
