"""One request as the connector's scheduler side sees it: its keys, its lease, what was stored."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from typing import Any

from kvstrata.connectors.naming import roles
from kvstrata.keys import KeyChain, MediaItem
from kvstrata.objects import NOBODY
from kvstrata.wire import protocol as p
from kvstrata.wire.client import Call


class RequestState:
    """Everything the connector remembers of one request.

    Args:
        request: vLLM's request; its tokens grow while it runs.
        bypass: why nothing of it is cached; empty if it is.
    """

    def __init__(self, request: Any, bypass: str) -> None:
        self.request = request
        self.bypass = bypass
        self.roles = roles(request.kv_transfer_params)
        self.namespace = b""
        self.owner = NOBODY
        self.chain: KeyChain | None = None
        self.keys: list[bytes] = []
        self.tail = b""  # key of the prompt's end, where two engines share it
        self.tail_stored = False
        self._hashed: tuple[int, int] = (0, 0)
        # the match under way, and since when
        self.call: Call | None = None
        self.seen_at = 0.0  # when vLLM asked for it last
        self.asked_at = 0.0
        self.waited = False  # the engine has waited for a match of this request
        # what was found: a lease on leading chunks, its slots, their tiers
        self.lease = 0
        self.tiers = b""
        self.offsets: array[int] = array("q")
        self.matched = False
        self.reckoned: p.Matched | None = None  # with what the node thought it would take
        # the load that was decided
        self.local_tokens = 0
        self.num_local = 0  # tokens that vLLM itself had when it asked last
        self.sync = False
        self.failed = False
        self.came: int | None = None  # chunks of a load that ended early
        # chunks that are known to be stored, or were handed to the workers to store
        self.num_stored = 0
        # for the record
        self.arrived_at = time.monotonic()
        self.hit_chunks: Counter[str] = Counter()  # by the tier's name
        self.loaded_tokens = 0
        self.loaded_how = ""
        self.stored_chunks = 0
        self.miss = ""
        self.peer_refused = ""
        self.load_began = self.load_took = 0.0
        self.computed_at = 0.0  # when the prompt was there, whichever way

    @property
    def asked(self) -> list[bytes]:
        """Keys of all that may be found: chunks, and the prompt's end where it is the end."""
        assert self.chain is not None
        is_prompt = len(self.keys) == self.request.num_prompt_tokens // self.chain.chunk_tokens
        return [*self.keys, self.tail] if self.tail and self.roles.peer and is_prompt else self.keys

    @property
    def num_whole(self) -> int:
        """Whole chunks that were found."""
        return min(len(self.tiers), len(self.keys))

    def nothing_is_left(self, num_computed: int, chunk_tokens: int) -> bool:
        """Whether vLLM itself has all that could be found for the request."""
        request = self.request
        if num_computed // chunk_tokens < request.num_tokens // chunk_tokens:
            return False
        may_have_tail = self.roles.peer and request.num_tokens == request.num_prompt_tokens
        return not may_have_tail or num_computed >= request.num_tokens - 1

    def num_found(self, chunk_tokens: int) -> int:
        """Tokens that were found."""
        if len(self.tiers) > len(self.keys):
            return int(self.request.num_prompt_tokens)
        return len(self.tiers) * chunk_tokens

    def rehash(self) -> bool:
        """Bring the keys up to date with the request's tokens; whether any changed."""
        assert self.chain is not None
        request, size = self.request, self.chain.chunk_tokens
        # A streaming session may rewrite tokens that were there before.
        version = (request.num_tokens, id(request.prompt_token_ids))
        if version == self._hashed and not request.resumable:
            return False
        rewritten = request.resumable or version[1] != self._hashed[1]
        known = 0 if rewritten else min(len(self.keys), request.num_tokens // size)
        whole = request.num_tokens // size * size
        tokens = request.all_token_ids[known * size : whole]
        media = [
            MediaItem(item.identifier, item.mm_position.offset, item.mm_position.length)
            for item in request.mm_features
        ]
        parent = self.keys[known - 1] if known else None
        before = self.keys
        self.keys = before[:known] + self.chain.keys(tokens, media, known * size, parent)
        self._hashed = version
        if (self.roles.peer or self.roles.lends) and (rewritten or not known):
            self._hash_tail(media)
        return self.keys != before

    def _hash_tail(self, media: list[MediaItem]) -> None:
        assert self.chain is not None
        request, size = self.request, self.chain.chunk_tokens
        whole = request.num_prompt_tokens // size * size
        tokens = request.all_token_ids[whole : request.num_prompt_tokens]
        parent = self.keys[whole // size - 1] if whole else None
        self.tail = self.chain.tail(tokens, media, whole, parent) if tokens else b""

    def forget_match(self) -> None:
        """Forget what was found; the lease must have been released."""
        self.lease = 0
        self.tiers = b""
        self.offsets = array("q")
        self.matched = False
        self.sync = False

    def record(self, outcome: str, chunk_tokens: int) -> dict[str, Any]:
        """What an operator may want to know of this request."""
        return {
            "request": self.request.request_id,
            "outcome": outcome,
            "tokens": self.request.num_tokens,
            "prompt_tokens": self.request.num_prompt_tokens,
            "host_tokens": self.hit_chunks["host"] * chunk_tokens,
            "slower_tokens": (self.hit_chunks.total() - self.hit_chunks["host"]) * chunk_tokens,
            "local_tokens": self.local_tokens,
            "loaded_tokens": self.loaded_tokens,
            "load": self.loaded_how if self.loaded_tokens else "",
            "stored_chunks": self.stored_chunks,
            "miss": self.bypass or self.miss,
            "peer": self.peer_refused or self.roles.peer,
            **self._plan(),
            "seconds": round(time.monotonic() - self.arrived_at, 4),
        }

    def _plan(self) -> dict[str, Any]:
        """What the node reckoned, and what came true."""
        if self.reckoned is None:
            return {}
        reckoned, began = self.reckoned, self.load_began or self.arrived_at
        ended = began + self.load_took
        return {
            "found_chunks": reckoned.found,
            "kept_chunks": len(reckoned.tiers),
            "load_s_expected": round(reckoned.load_s, 4),
            "load_s": round(self.load_took, 4),
            "rest_s_expected": round(reckoned.rest_s, 4),
            "all_s_expected": round(reckoned.compute_s, 4),
            "computed_s": round(max(0.0, self.computed_at - ended), 4),
        }
