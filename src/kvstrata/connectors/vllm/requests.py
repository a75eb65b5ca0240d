"""One request as the connector's scheduler side sees it: its keys, its lease, what was stored."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from kvstrata.connectors.hints import hints
from kvstrata.connectors.naming import roles
from kvstrata.connectors.vllm.named import Named
from kvstrata.connectors.vllm.reasons import Account
from kvstrata.connectors.vllm.stats import Tally
from kvstrata.header import MARK_TOKENS, NOBODY
from kvstrata.heads import heads
from kvstrata.keys import KeyChain, MediaItem
from kvstrata.observe.reasons import Reason, Why
from kvstrata.observe.tracing import Span, Tracer
from kvstrata.wire import protocol as p
from kvstrata.wire.client import Call

MAX_ID = 256
"""Characters of a request's id in its record: a client chooses it, of any length."""


class Beginning(NamedTuple):
    """The last object of what was found, of which only the first tokens are the prompt's.

    Args:
        num_tokens: that it has.
        good_tokens: that are the prompt's.
    """

    num_tokens: int
    good_tokens: int


class RequestState:
    """Everything the connector remembers of one request.

    Args:
        request: vLLM's request; its tokens grow while it runs.
        bypass: why nothing of it is cached; empty if it is.
        tracer: of those requests that are traced.
        allowed: the hints that clients may give.
        inside: whether chunks are reused that it parts from, and its end is stored.
        prefix_only: whether any part of a prefix can be loaded. If not, a load ends before the last
            token: neither a state nor a window can be taken back by one.
        stateful: whether there are states, so that nothing ends within a chunk.
    """

    def __init__(
        self,
        request: Any,
        bypass: str,
        tracer: Tracer | None = None,
        allowed: Collection[str] = (),
        inside: bool = False,
        prefix_only: bool = True,
        stateful: bool = False,
    ) -> None:
        self.request = request
        self.bypass = bypass
        self.roles = roles(request.kv_transfer_params)
        self.hints = hints(request.kv_transfer_params, allowed)
        self._prefix_only = prefix_only
        self._stateful = stateful
        self.namespace = b""
        self.engines = False  # whether other engines share it
        self.owner = NOBODY
        self.chain: KeyChain | None = None
        self.keys: list[bytes] = []
        # by another secret that is known, and looked up where the first one's keys are missed
        self.other_owner = NOBODY
        self.other_chain: KeyChain | None = None
        self.other_first = False  # whether what is looked for was stored by it
        self.tail = b""  # key of the prompt's end, where two engines share it
        self.tail_stored = False
        self._hashed: tuple[int, int] = (0, 0)
        self._heads = b""
        # the match under way, and since when
        self.call: Call | None = None
        self.question: list[bytes] = []  # its keys
        self.by_other = False  # whether these are the other secret's
        self.seen_at = 0.0  # when vLLM asked for it last
        self.asked_at = 0.0
        self.waited = False  # the engine has waited for a match of this request
        # what was found: a lease on leading chunks, their keys and more, their slots, their tiers
        self.lease = 0
        self.found: list[bytes] = []
        self.tiers = b""
        self.offsets: array[int] = array("q")
        self.beginning: Beginning | None = None  # what of the last of these is no chunk of it
        self.inside = inside
        self.asked_inside = False
        # what it names of its prompt, and from which token on it is not exact any more
        self.named: Named | None = None
        self.taint: int | None = None
        self.matched = False
        self.reckoned: p.Matched | None = None  # with what the node thought it would take
        self.why: Sequence[Reason] = ()  # what the node said of the chunks behind those
        self.trouble: Why | None = None  # why it said nothing
        # the load that was decided
        self.local_tokens = 0
        self.sync = False
        self.failed = False
        self.expects_end = False  # what it loads is to come, and of use only whole
        self.in_vain = False  # it has waited for that, and it did not come
        self.came: int | None = None  # chunks of a load that ended early
        # chunks that are known to be stored, or were handed to the workers to store
        self.num_stored = 0
        self.num_kept = 0  # that were found by the secret that stores use
        self.num_given = 0  # that vLLM had or that were loaded, so not computed
        self.num_states = 0  # of which the newest state is stored, or was loaded
        self.step_end = 0  # tokens after the last step
        # for the record
        self.arrived_at = time.monotonic()
        self.hit_chunks: Counter[str] = Counter()  # by the tier's name
        self.loaded_tokens = 0
        self.met_tokens = 0  # that were computed while the others were loaded
        self.inside_tokens = 0  # of them, of an object that only begins like the prompt
        self.loaded_how = ""
        self.loaded_from: Counter[str] = Counter()  # tokens of objects, by who computed them
        self.other_tokens = 0  # of those loaded, found by the other secret
        self.stored_chunks = 0
        self.miss = ""
        self.tier_names: Mapping[int, str] = {}  # by their numbers in ``tiers``
        self.own_tokens = 0  # that vLLM had when it asked last
        self.account: Account | None = None
        self.peer_refused = ""
        self.load_began = self.load_took = 0.0
        # spans, where the request is traced
        self._tracer = tracer
        self.span: Span | None = None
        self.lookup_span: Span | None = None
        if tracer is not None and (parent := tracer.begins(request.trace_headers)) is not None:
            self.span = tracer.start("kvstrata.request", parent)
        self.chunk_s = self.pair_s = 0.0  # what computing takes, as the node was told
        self.computed_at = 0.0  # when the prompt was there, whichever way

    @property
    def asked(self) -> list[bytes]:
        """Keys of all that may be found: chunks, and the prompt's end where it is the end."""
        return self._with_end(self.keys[: self._most_chunks()], self.tail)

    @property
    def asked_by_other(self) -> list[bytes]:
        """The same by the other secret; as many."""
        assert self.other_chain is not None
        num_chunks = min(len(self.keys), self._most_chunks())
        tokens = self.request.all_token_ids[: num_chunks * self.other_chain.chunk_tokens]
        keys = self.other_chain.keys(tokens, self._media())
        end = self.request.num_prompt_tokens
        return self._with_end(keys, self._end_of(self.other_chain, keys, end) if self.tail else b"")

    def _most_chunks(self) -> int:
        """Leading chunks that may be loaded: as the request's hints let it."""
        assert self.chain is not None
        most = min(self.hints.load_limit, self.reach)
        if self.taint is not None:
            most = min(most, self.taint)
        return most // self.chain.chunk_tokens

    @property
    def store_limit(self) -> int:
        """Leading tokens that may be stored: as its hints let it, and nothing that is not exact."""
        limit = self.hints.store_limit
        return limit if self.taint is None else min(limit, self.taint)

    @property
    def reach(self) -> int:
        """Leading tokens that a load may end at."""
        return int(self.request.num_tokens) - (not self._prefix_only)

    @property
    def left_out(self) -> bool:
        """Whether the request's hints keep chunks from being loaded."""
        assert self.chain is not None
        return self.hints.load_limit // self.chain.chunk_tokens < len(self.keys)

    def nothing_is_left(self, num_computed: int, chunk_tokens: int) -> bool:
        """Whether vLLM itself has all that could be found for the request."""
        request = self.request
        if self.parts_inside and not num_computed:
            return bool(request.num_tokens - 1 <= MARK_TOKENS)
        if num_computed // chunk_tokens < self.reach // chunk_tokens:
            return False
        may_have_tail = self.has_tail and request.num_tokens == request.num_prompt_tokens
        return not may_have_tail or num_computed >= request.num_tokens - 1

    @property
    def parts_inside(self) -> bool:
        """Whether it is asked what begins like it; of a peer it has its end, whole."""
        return self.inside and not self.roles.peer

    @property
    def num_whole(self) -> int:
        """Leading objects that were found and are the prompt's, whole."""
        return len(self.tiers) - (self.beginning is not None)

    def last_tokens(self, last: int, chunk_tokens: int) -> int:
        """Of the last of so many objects, where it is no whole chunk of the prompt; 0: it is."""
        if self.beginning is not None and last == len(self.tiers):
            return self.beginning.num_tokens
        return self.request.num_prompt_tokens % chunk_tokens if last > len(self.keys) else 0

    def last_marks(self, last: int, chunk_tokens: int) -> bytes:
        """With which marks that object must begin; none: its key says all."""
        if self.beginning is None or last < len(self.tiers):
            return b""
        stop = (last - 1) * chunk_tokens + self.beginning.good_tokens
        return self.marks(range(last - 1, last), stop)

    def num_found(self, chunk_tokens: int) -> int:
        """Tokens that were found."""
        if self.beginning is not None:
            return self.num_whole * chunk_tokens + self.beginning.good_tokens
        if len(self.tiers) > len(self.keys):
            return int(self.request.num_prompt_tokens) - (not self._prefix_only)
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
        parent = self.keys[known - 1] if known else None
        before = self.keys
        self.keys = before[:known] + self.chain.keys(tokens, self._media(), known * size, parent)
        self._hashed = version
        if rewritten:
            self._heads = b""
        ends = self.has_tail or (self.roles.lends and not self._stateful)
        if ends and (rewritten or not known):
            end = request.num_prompt_tokens
            # The one token that is computed in any case needs no tail.
            needed = self._prefix_only or end % size != 1
            self.tail = self.end_at(end) if needed else b""
        return self.keys != before

    def end_at(self, stop: int) -> bytes:
        """Key of the tail that ends at this position; empty where a chunk does."""
        assert self.chain is not None
        return self._end_of(self.chain, self.keys, stop)

    def marks(self, chunks: range, stop: int) -> bytes:
        """Marks of these chunks, as far as they lie before position ``stop``."""
        assert self.chain is not None
        size = self.chain.chunk_tokens
        tokens = self.request.all_token_ids[chunks.start * size : min(stop, chunks.stop * size)]
        parents = [self.keys[number - 1] if number else None for number in chunks]
        return b"".join(self.chain.marks(tokens, parents, self._media(), chunks.start * size))

    @property
    def has_tail(self) -> bool:
        """Whether the prompt's end may be found that fills no chunk."""
        return bool(self.roles.peer) and not self._stateful

    def heads_by(self, secret: bytes) -> bytes:
        """How the prompt begins, whatever the namespace; see `kvstrata.heads`."""
        if not self._heads:
            assert self.chain is not None
            size = self.chain.chunk_tokens
            self._heads = heads(secret, self.request.all_token_ids, size, self._media())
        return self._heads

    def missed(self, why: Why, miss: str) -> None:
        """No answer of the node counts."""
        self.trouble, self.miss = why, miss

    def granted(self, num_external: int) -> None:
        """vLLM gives the request its blocks; only what it is given first is accounted for."""
        if self.account is not None:
            return
        trouble, detail = self.trouble, self.miss if self.trouble is not None else ""
        if self.bypass or self.request.skip_reading_prefix_cache:
            trouble, detail = Why.BYPASSED, self.bypass or "the request reads no cache"
        granted = self.own_tokens + num_external
        if self.roles.lends:
            self.step_end = granted  # so that a state there is kept for the other engine, too
        found = self.num_whole
        cap = "hints" if self.hints.load_limit < self.request.num_prompt_tokens else "message"
        self.account = Account(
            self.own_tokens, granted, found, self.why, trouble, detail, cap,
            always=0 if self._prefix_only else 1,
        )  # fmt: skip

    def ended_early(self, came: int, chunk_tokens: int) -> None:
        """The load brought nothing from chunk number ``came`` on; what was found is still known."""
        if self.account is not None:
            lost = max(came, self.local_tokens // chunk_tokens)
            key, tier = "", ""
            if lost < len(self.tiers):
                key, tier = self.found[lost].hex(), self.tier_names.get(self.tiers[lost], "")
            self.account.end_at(came * chunk_tokens, key, tier)
        # What it was thought to have is not there: store what is recomputed.
        came_tokens = came * chunk_tokens - self.local_tokens - self.met_tokens
        self.loaded_tokens = max(0, min(self.loaded_tokens, came_tokens))
        self.inside_tokens = 0
        self.num_stored = min(self.num_stored, came)
        self.num_states = min(self.num_states, came)
        self.num_given = came

    def met(self, first: int, chunk_tokens: int) -> None:
        """What lies before chunk number ``first`` was computed, not loaded, unless it was there."""
        slower = range(self.local_tokens // chunk_tokens, min(first, len(self.tiers)))
        computed = [number for number in slower if self.tiers[number]]
        self.hit_chunks.subtract(self.tier_names.get(self.tiers[i], "?") for i in computed)
        start = max(self.local_tokens, computed[0] * chunk_tokens) if computed else 0
        self.met_tokens = first * chunk_tokens - start if computed else 0
        self.loaded_tokens = max(0, self.loaded_tokens - self.met_tokens)

    def _media(self) -> list[MediaItem]:
        return [
            MediaItem(item.identifier, item.mm_position.offset, item.mm_position.length)
            for item in self.request.mm_features
        ]

    def _with_end(self, keys: list[bytes], end: bytes) -> list[bytes]:
        assert self.chain is not None
        num_tokens = self.request.num_prompt_tokens
        is_prompt = len(keys) == num_tokens // self.chain.chunk_tokens
        is_prompt = is_prompt and num_tokens <= self.hints.load_limit
        return [*keys, end] if end and self.has_tail and is_prompt else keys

    def _end_of(self, chain: KeyChain, keys: list[bytes], stop: int) -> bytes:
        whole = stop // chain.chunk_tokens * chain.chunk_tokens
        tokens = self.request.all_token_ids[whole:stop]
        parent = keys[whole // chain.chunk_tokens - 1] if whole else None
        return chain.tail(tokens, self._media(), whole, parent) if tokens else b""

    def forget_match(self) -> None:
        """Forget what was found; the lease must have been released."""
        self.lease = 0
        self.found = []
        self.tiers = b""
        self.offsets = array("q")
        self.beginning = None
        self.asked_inside = False
        self.num_kept = 0
        self.matched = False
        self.sync = False

    @property
    def shown_id(self) -> str:
        """The request's id as operators see it: of bounded length, and Unicode."""
        name = self.request.request_id[: MAX_ID + 1].encode(errors="replace").decode()
        return name if len(name) <= MAX_ID else f"{name[: MAX_ID - 1]}…"

    def load_ended(self, tally: Tally, *, failed: bool) -> None:
        """Its load has ended, one way or the other."""
        self.load_took = time.monotonic() - self.load_began
        outcome = "failed" if failed else "ok" if self.came is None else "early"
        tally.add("loads_total", 1, self.loaded_how, outcome)
        tally.observe("load_seconds", self.load_took, self.loaded_how)
        if self.span is not None and self._tracer is not None:
            span = self._tracer.start("kvstrata.load", self.span.traceparent, ago_s=self.load_took)
            span.end(
                failed="" if outcome == "ok" else outcome,
                tokens=self.loaded_tokens,
                tiers=",".join(self.hit_chunks),
                how=self.loaded_how,
            )

    @property
    def trace(self) -> str:
        """What its stores belong to; empty: it is not traced."""
        return self.span.traceparent if self.span is not None else ""

    def look_up(self) -> str:
        """Its lookup begins: the traceparent that the node is told; empty: it is not traced."""
        if self.span is None or self._tracer is None:
            return ""
        self.looked_up("given up")
        self.lookup_span = self._tracer.start("kvstrata.lookup", self.span.traceparent)
        return self.lookup_span.traceparent

    def looked_up(self, failed: str = "") -> None:
        """Its lookup has ended."""
        if self.lookup_span is not None:
            chunks = len(self.tiers)
            self.lookup_span.end(failed=failed, chunks_asked=len(self.question), chunks=chunks)
            self.lookup_span = None

    def ended(self, tally: Tally, chunk_tokens: int) -> None:
        """It has ended itself."""
        tally.add("asked_tokens_total", self.request.num_prompt_tokens)
        for tier, count in self.tier_tokens(chunk_tokens).items():
            if count:
                tally.add("hit_tokens_total", count, tier)
        if why := self.bypass or self.miss:
            tally.missed(why)
        if self.named is not None:
            self.named.ended(tally)
        self.looked_up("given up")
        if self.span is not None:
            self.span.end(
                request_id=self.shown_id,
                prompt_tokens=self.request.num_prompt_tokens,
                loaded_tokens=self.loaded_tokens,
                stored_chunks=self.stored_chunks,
                miss=why,
            )

    def tier_tokens(self, chunk_tokens: int) -> dict[str, int]:
        """Tokens that were loaded, by the tier that they came from."""
        tokens, left = {}, self.loaded_tokens
        for tier, chunks in self.hit_chunks.items():
            # A load may be cut within a chunk, so there may be nothing left for the last one.
            if count := min(left, chunks * chunk_tokens):
                tokens[tier] = count
            left -= count
        return tokens


def bypass_of(request: Any) -> str:
    """Why nothing of a request is cached; empty if it is."""
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "prompt embeddings have no token ids"
    if request.pooling_params is not None:
        return "pooling requests are not cached"
    if any(item.identifier is None for item in request.mm_features):
        return "a multimodal item has no identifier"
    if request.lora_request is not None and request.lora_request.load_inplace:
        return "an adapter that is reloaded in place has no lasting identity"
    return ""
