"""Signposts of the texts that a request names, once the chunks that hold them are stored.

They are some hundred bytes, written by the scheduler's side on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from kvstrata.blend.anchors import NEAR_TOKENS, sketch
from kvstrata.blend.signposts import GROUP, ORDER, PART, Signpost, Signposts
from kvstrata.errors import KVStrataError
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

MAX_WAITING = 1024
"""Beyond it they are dropped: what is not written today is written with the next prompt."""


class Post(NamedTuple):
    """One signpost to write.

    Args:
        key: of it.
        signpost: what it says.
        num_tokens: of the text.
    """

    key: bytes
    signpost: Signpost
    num_tokens: int


def posts_of(
    posts: Signposts, key: bytes, signpost: Signpost, tokens: Sequence[int], text: range
) -> list[Post]:
    """What is written of a text: its signpost, and that of its place behind what comes before it.

    Args:
        posts: makes keys of texts.
        key: of its signpost.
        signpost: where it is.
        tokens: of the prompt.
        text: its positions there.
    """
    before = sketch(tokens[max(0, text.start - NEAR_TOKENS) : text.start])
    place = posts.key(tokens[text.start : text.stop], signpost.place)
    return [
        Post(key, signpost, len(text)),
        Post(place, replace(signpost, before=before), len(text)),
    ]


class Whose(NamedTuple):
    """What signposts belong to; as of `NodeClient.reserve`."""

    namespace: bytes
    owner: bytes
    chunk_tokens: int
    cost: float
    priority: int
    tiers: list[str]


class Signing:
    """Writes signposts.

    Args:
        timeout_s: for each answer of the node.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(MAX_WAITING)

    def write(
        self, client: NodeClient, posts: Signposts, whose: Whose, some: Sequence[Post]
    ) -> None:
        """Begin to write signposts; waits for nothing, and tells nobody if it fails."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "kvstrata-signposts")
        for post in some:
            if self._room.acquire(blocking=False):
                self._threads.submit(self._write, client, posts, whose, post)

    def close(self) -> None:
        """End the thread, and what it does. Repeatable."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _write(self, client: NodeClient, posts: Signposts, whose: Whose, post: Post) -> None:
        try:
            self._store(client, posts, whose, post)
        except KVStrataError as error:
            logger.debug("KVStrata: a signpost is not written: %s", error)
        except Exception:
            logger.exception("KVStrata: a signpost's store died of a bug")
        finally:
            self._room.release()

    def _store(self, client: NodeClient, posts: Signposts, whose: Whose, post: Post) -> None:
        payload = posts.encode(post.key, post.signpost, post.num_tokens)
        size = whose.chunk_tokens
        template = p.Template(
            "native", ORDER, "uint8", [len(payload)], size, len(payload), size, GROUP
        )
        reserved: p.Reserved = client.reserve(
            whose.namespace, [post.key], 0, PART, template, whose.cost, owner=whose.owner,
            priority=whose.priority, tiers=whose.tiers,
        ).wait(self._timeout_s)  # fmt: skip
        (offset,) = offsets_of(reserved.offsets)
        if offset >= 0:
            client.pool.view(offset + HEADER_BYTES, len(payload))[:] = payload
            client.commit(reserved.reservation, [checksum(payload)]).wait(self._timeout_s)
