"""Where the texts lie that a request names: their signposts, then the chunks that these name.

A search asks for all signposts at once, and for a text's chunks as soon as its signpost is there.
What it ends with is leased: leading chunks of each text, perhaps none. Of a text that is looked for
at several places each is an entry of its own; its first signpost is asked for where none of them
has enough of it, as where it was written by a release without places.
"""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from kvstrata.blend.segments import MIN_TOKENS
from kvstrata.blend.signposts import ORDER, PART, PLACES, Signpost, Signposts
from kvstrata.errors import CorruptObject, KVStrataError
from kvstrata.objects import HEADER_BYTES, stored_bytes, verify_object
from kvstrata.observe.reasons import Why
from kvstrata.parts import identity
from kvstrata.wire import protocol as p
from kvstrata.wire.client import Call, NodeClient, offsets_of

logger = logging.getLogger(__name__)

MAX_PLACES = 256
"""Questions to the node for one request; of the texts behind those one each."""
STALE_S = 60.0
"""A signpost that is as old, and whose first chunk has gone, is removed: a fresh one may follow."""
STILL_THERE = (Why.CAPPED, Why.TIER_OFF, Why.DEADLINE, Why.ARRIVING, Why.PLANNED, Why.NO_NODE)
"""Why this request does not get a chunk that may be there for the next one."""


class Question(NamedTuple):
    """What every match of a search says; as of `NodeClient.match`."""

    parts: list[int]
    orders: list[str]
    lengths: list[int]
    owner: bytes
    namespace: bytes
    chunk_s: float
    tiers: list[str]


class Text:
    """One named text of a prompt, and what is known of where it lies.

    Args:
        tokens: its positions in the prompt.
        key: of its signpost.
        place: which one that is: as of `Signposts.key`.
    """

    def __init__(self, tokens: range, key: bytes, place: int = 0) -> None:
        self.tokens = tokens
        self.key = key
        self.place = place
        self.signpost: Signpost | None = None
        self.created_ns = 0  # when that was written
        # a lease on its leading chunks, their tiers and slots
        self.lease = 0
        self.tiers = b""
        self.offsets: array[int] = array("q")
        # what is under way: the question, and the lease of the signpost
        self.call: Call | None = None
        self.post_lease = 0


def looked_for(
    posts: Signposts,
    keys: Sequence[bytes],
    tokens: Sequence[int],
    texts: Sequence[range],
    span: range,
    *,
    places: bool,
) -> list[Text]:
    """What is to be looked for.

    Args:
        posts: makes keys of texts.
        keys: of the texts' signposts.
        tokens: of the prompt.
        texts: their positions.
        span: positions that a load is for; what has little there is left out.
        places: whether at each of their places, too; of as many texts as `MAX_PLACES` allows.
    """
    found: list[Text] = []
    for text, key in zip(texts, keys, strict=True):
        if min(text.stop, span.stop) - max(text.start, span.start) < MIN_TOKENS:
            continue
        if places and len(found) + PLACES < MAX_PLACES:
            some = tokens[text.start : text.stop]
            found += [Text(text, posts.key(some, one), one) for one in range(1, PLACES + 1)]
        found.append(Text(text, key))
    return found


class Search:
    """Of one request; on the scheduler's one thread.

    Args:
        client: of the node.
        posts: makes keys of texts.
        question: for their chunks.
        texts: that are looked for.
    Raises:
        NodeUnavailable: the node has gone.
    """

    def __init__(
        self, client: NodeClient, posts: Signposts, question: Question, texts: Sequence[Text]
    ) -> None:
        self.node = client.hello.node
        self.texts = texts
        self.began = time.monotonic()
        self._client, self._posts, self._question = client, posts, question
        placed = {text.tokens for text in texts if text.place}
        self._spare = [text for text in texts if not text.place and text.tokens in placed]
        for text in texts:
            if text.place or text.tokens not in placed:
                self._ask(text)

    @property
    def done(self) -> bool:
        """Whether nothing is waited for any more."""
        return all(text.call is None for text in self.texts)

    def go_on(self, patience_s: float = 0.0) -> bool:
        """Take in what has come, and ask what follows from it; whether that was all.

        Args:
            patience_s: how long to wait for more.
        """
        deadline = time.monotonic() + patience_s
        while not self.done:
            # All that has come is heard before anything is waited for: what follows from it is
            # asked at once.
            if any([self._try(text) for text in self.texts]):
                continue
            left, waiting = deadline - time.monotonic(), self._waiting()
            if left <= 0 or waiting is None:
                break
            with contextlib.suppress(KVStrataError):  # heard of by whoever asks next
                self._client.pump(waiting, left)
        if self.done and self._ask_spare():
            return self.go_on(max(0.0, deadline - time.monotonic()))
        return self.done

    def older_than(self, seconds: float) -> bool:
        """Whether it began longer ago than that."""
        return time.monotonic() - self.began > seconds

    def give_up(self) -> None:
        """Wait for nothing, and hold nothing. Repeatable."""
        for text in self.texts:
            self._let_be(text)
            self._client.release(text.lease)
            text.lease, text.tiers = 0, b""

    def stop(self) -> None:
        """Wait for nothing any more; what was found is still held."""
        for text in self.texts:
            self._let_be(text)

    def _ask(self, text: Text) -> None:
        question, nbytes = self._question, self._posts.payload_bytes(len(text.tokens), text.place)
        text.call = self._client.match(
            [text.key], [PART], [ORDER], [nbytes],
            question.owner, question.namespace, tiers=question.tiers,
        )  # fmt: skip

    def _ask_spare(self) -> bool:
        """Ask for the first signposts of texts that were found at no place; whether there are."""
        found = {text.tokens for text in self.texts if self._num_found(text) >= MIN_TOKENS}
        asked = [text for text in self._spare if text.tokens not in found]
        self._spare = []
        with contextlib.suppress(KVStrataError):  # the node has gone: who holds a search sees it
            for text in asked:
                self._ask(text)
        return any(text.call is not None for text in asked)

    def _num_found(self, text: Text) -> int:
        """Tokens from a text's first one up to the end of the chunks that were found."""
        if text.signpost is None or not text.tiers:
            return 0
        size = self._posts.chunk_tokens
        return len(text.tiers) * size - text.signpost.start % size

    def _waiting(self) -> Call | None:
        return next((text.call for text in self.texts if text.call is not None), None)

    def _try(self, text: Text) -> bool:
        """Take in a text's answer, if it has come; whether that brought it on."""
        if text.call is None:
            return False
        try:
            if not text.call.ready():
                return False
            self._hear(text, text.call)
        except KVStrataError as error:
            logger.debug("KVStrata: a text was not found: %s", error)
            text.call = None
        return True

    def _let_be(self, text: Text) -> None:
        if text.call is not None:
            text.call.abandon()
            text.call = None
        self._client.release(text.post_lease)
        text.post_lease = 0

    def _hear(self, text: Text, call: Call) -> None:
        """Take in an answer.

        Raises:
            KVStrataError: there is none, or it is of no use.
        """
        text.call = None
        if text.signpost is not None:
            found: p.Matched = call.wait(0)
            text.lease, text.tiers = found.lease, found.tiers
            text.offsets = offsets_of(found.offsets)
            is_old = time.time_ns() - text.created_ns > STALE_S * 1e9
            if is_old and not found.found and not any(one.why in STILL_THERE for one in found.why):
                self._remove(text)
            return
        reply: p.Matched | p.Arrived = call.wait(0)
        if isinstance(reply, p.Matched):
            text.post_lease = reply.lease
        offsets = offsets_of(reply.offsets)
        if not offsets:
            self._let_be(text)
        elif offsets[0] == p.ARRIVING:
            text.call = self._client.begin(p.Await, p.Arrived, text.post_lease, 0)
        else:
            self._read(text, offsets[0])
            keys, question = text.signpost.keys if text.signpost else (), self._question
            text.call = self._client.match(
                keys, question.parts, question.orders, question.lengths,
                question.owner, question.namespace, question.chunk_s, tiers=question.tiers,
            )  # fmt: skip

    def _read(self, text: Text, offset: int) -> None:
        """Read the signpost in a slot.

        Raises:
            CorruptObject, Incompatible: it is none, whatever the reason.
        """
        nbytes = self._posts.payload_bytes(len(text.tokens), text.place)
        try:
            whole = bytes(self._client.pool.view(offset, stored_bytes(nbytes)))
            header = verify_object(whole, identity(text.key, PART))
            payload = whole[HEADER_BYTES : HEADER_BYTES + header.raw_length]
            text.created_ns = header.created_ns
            text.signpost = self._posts.decode(text.key, payload, len(text.tokens), text.place)
        except CorruptObject:
            self._remove(text)
            raise
        finally:
            self._let_be(text)

    def _remove(self, text: Text) -> None:
        """A signpost is of no use: let there be room for a fresh one."""
        self._client.send(p.Clear(0, text.key))
