"""Blends in the scheduler: whether a request may have one, what it is put together of, what of it
nobody else may have.

To vLLM a blend is a load in the background. Up to its first token that was computed behind another
text it is what an exact hit would be; from there on it is the request's own and nobody else's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from blake3 import blake3
from vllm.distributed.kv_events import BlockRemoved

from kvstrata.blend import Rule
from kvstrata.blend.segments import MIN_TOKENS, Asked
from kvstrata.blend.signposts import Signpost, Signposts, covering
from kvstrata.config import Config
from kvstrata.connectors.vllm.assembling import Assembly, source_of, within
from kvstrata.connectors.vllm.engine import refuse
from kvstrata.connectors.vllm.finding import Question, Search, looked_for
from kvstrata.connectors.vllm.groups import Groups
from kvstrata.connectors.vllm.lookups import Lookups
from kvstrata.connectors.vllm.messages import Blend, Piece, WorkerHello
from kvstrata.connectors.vllm.named import Made, Named
from kvstrata.connectors.vllm.pace import Pace
from kvstrata.connectors.vllm.poison import Withdrawals, may_be_poisoned, poison
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.connectors.vllm.signing import Post, Signing, Whose, posts_of
from kvstrata.connectors.vllm.texts import Texts
from kvstrata.errors import Incompatible, KVStrataError, UsageError
from kvstrata.quality.blending.choice import pick_blend
from kvstrata.quality.bound import Bound

logger = logging.getLogger(__name__)

NOT_ALLOWED = "blending is off here: see the operator's option blend"
NOT_YET = "the engine has not shown yet that it can: it tries with the first prompt"
MAX_CHOICES = 256
MAX_WAITS = 3
"""In so many steps of others a request is waited for: as many as a search has answers in turn."""


class Blending:
    """Lives on the scheduler's one thread.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: its groups.
        config: KVStrata's.
        groups: the engine's, as KVStrata sees them.
        lookups: know the node.
        pace: of the engine's steps.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        config: Config,
        groups: Groups,
        lookups: Lookups,
        pace: Pace,
    ) -> None:
        self._config, self._groups, self._lookups, self._pace = config, groups, lookups, pace
        self._chunk, self._block = groups.chunk_tokens, groups.each[0].block_tokens
        self._hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or self._block
        self._off = "" if config.blend == "on" else NOT_ALLOWED
        if not self._off:
            try:
                refuse(vllm_config, kv_cache_config)
            except Incompatible as error:
                self._refuse(f"this engine has {error}")
        self.proven = False
        self._signing = Signing(config.deadlines.request)
        self._texts = Texts(vllm_config.model_config)
        self._withdrawn: Withdrawals | None = None
        if lookups.events is not None:
            per_block = self._block // self._hash_tokens
            self._withdrawn = Withdrawals(self._hash_tokens, per_block, lookups.events.group)
        self._choose = lru_cache(MAX_CHOICES)(_choose)
        self._held: dict[str, Search] = {}  # of the blends in the workers' hands

    # whether it is possible

    @property
    def untried(self) -> bool:
        """Whether the workers are to show that they can."""
        return not self._off and not self.proven

    def introduce(self, hellos: Sequence[WorkerHello]) -> None:
        """Learn whether the workers can."""
        why = next((hello.no_blends for hello in hellos if hello.no_blends), "")
        if not self._off and why:
            self._refuse(why)

    def hear(self, tried: str | None, turned: str | None) -> None:
        """What the workers' trial said, if there was one."""
        if self._off or self.proven:
            return
        if tried or turned:
            self._refuse(f"its test failed: {tried or turned}")
        elif turned is not None:
            self.proven = True
            logger.info("KVStrata blends prompts of requests that ask for it")

    # a request

    def begin(self, state: RequestState) -> None:
        """A new request: what it names of its prompt, if it does."""
        asked: Asked | None = state.hints.given.get("blend")
        if asked is None:
            return
        try:
            if self._off:
                raise UsageError(self._off)
            state.named = self._texts.of(state, asked)
        except (ValueError, KVStrataError) as error:
            state.hints = state.hints.without("blend", str(error))

    def answer(self, state: RequestState, num_computed: int, *, busy: bool) -> int | None:
        """Tokens that a blend brings behind those that vLLM has; 0: there is none; None: not yet.

        From the first answer on that is more than 0 the request is not exact.

        Args:
            state: of a request whose exact hit is known.
            num_computed: tokens that vLLM has itself.
            busy: whether requests run that a wait would hold up.
        """
        wanted = state.named
        if wanted is None or not wanted.asked.wants_more or state.account is not None:
            return 0
        if wanted.made is None:
            if wanted.why:
                return 0
            if not self._search(state, wanted, num_computed, busy=busy):
                return None
            if wanted.why:
                return 0
        assert wanted.made is not None
        if wanted.search is None or not self._holds(wanted.search):
            return 0
        return max(0, wanted.made.end - num_computed)

    def is_next(self, state: RequestState) -> bool:
        """Whether what vLLM gave a request its blocks for is a blend."""
        return (
            state.named is not None
            and state.named.made is not None
            and (state.named.search is not None)
        )

    def hand_over(self, state: RequestState, blocks: Any) -> tuple[Blend, bytes]:
        """The blend for the workers, once vLLM has given the request its blocks.

        Returns:
            It, and the tiers of the chunks that it is copied from.
        """
        wanted, client = state.named, self._lookups.client
        assert wanted is not None
        assert wanted.made is not None
        assert wanted.search is not None
        self._held[state.request.request_id], wanted.search = wanted.search, None
        made, parts, size = wanted.made, self._lookups.parts, self._chunk
        start = state.local_tokens
        sources, head = list(made.sources), list[Piece]()
        whole = min(state.num_whole * size, made.first)
        if start < whole:
            count = -(-whole // size)
            sources.append(source_of(state.lease, state.found[:count], state.offsets, len(parts)))
            for number in range(start // size, count):
                at, stop = max(start, number * size), min(whole, (number + 1) * size)
                head.append(Piece(len(sources) - 1, number, at - number * size, stop - at, at, at))
        span = range(start, made.end)
        rows = [[within(one, span) for one in run] for run in made.runs]
        runs = [[one for one in run if one is not None] for run in rows if run[0] is not None]
        tokens = list(state.request.all_token_ids[: made.end])
        ids = blocks.get_block_ids()[0]
        tiers = bytes(state.tiers[piece.chunk] for piece in head) + made.tiers
        blend = Blend(
            request_id=state.request.request_id,
            node=client.hello.node if client is not None else b"",
            sources=sources,
            pieces=[*head, *(run[0] for run in runs)],
            tokens=tokens,
            table=list(ids[: made.end // self._block]),
            start=start,
            first=made.first,
            plan=wanted.rule.plan,
            ratio=wanted.rule.ratio,
            bound=wanted.rule.bound,
            parts=parts,
            seed=int.from_bytes(blake3(np.array(tokens, "<u4").tobytes()).digest(8), "little"),
            beside=[*([] for _ in head), *(run[1:] for run in runs)],
            weights=[*made.weights, 1.0],
        )
        return blend, tiers

    def computed(self, state: RequestState, num_tokens: int) -> None:
        """Its blend has ended well; the workers have computed so many tokens of it."""
        if state.named is not None:
            state.named.num_recomputed = num_tokens

    def ended(self, request_id: str, state: RequestState | None, *, failed: bool) -> None:
        """A load has ended; if it was a blend, its leases are let go of."""
        if (search := self._held.pop(request_id, None)) is None:
            return
        search.give_up()
        if failed and state is not None and state.named is not None:
            state.named.fail()

    def finished(self, state: RequestState) -> None:
        """A request has ended; a blend in the workers' hands is let go of when that has."""
        self.sign(state, at_end=True)
        self.give_up(state)
        if self._withdrawn is not None:
            self._withdrawn.end(state.request.request_id)

    def give_up(self, state: RequestState) -> None:
        """Let go of what was asked for or found for a request."""
        if state.named is not None and state.named.search is not None:
            state.named.search.give_up()
            state.named.search = None

    def computes(self, state: RequestState, num_tokens: int) -> None:
        """A step was planned, after which so many of a request's tokens are there."""
        if self._withdrawn is not None and state.taint is not None:
            self._withdrawn.computes(state.request, num_tokens)

    def sign(self, state: RequestState, *, at_end: bool = False) -> None:
        """Write signposts of the texts whose chunks were handed to the workers to store.

        Args:
            state: of a request.
            at_end: whether no more of them will be.
        """
        wanted, client = state.named, self._lookups.client
        if wanted is None or client is None or len(wanted.signed) == len(wanted.texts):
            return
        if state.chain is None:
            return  # it has no keys any more, or never had
        stored = state.num_stored
        if stored == wanted.num_stored and not at_end:
            return
        wanted.num_stored = stored
        some, keys, posts = list[Post](), self._keys(state, wanted), wanted.posts
        assert posts is not None
        for number, text in enumerate(wanted.texts):
            chunks = covering(text, self._chunk)
            last = min(chunks.stop, stored)
            # What is left behind the last whole chunk of a request's is not stored as one.
            enough = last == chunks.stop or (
                at_end and last * self._chunk - text.start >= MIN_TOKENS
            )
            if number in wanted.signed or not enough:
                continue
            wanted.signed.add(number)
            post = Signpost(text.start, tuple(state.keys[chunks.start : last]))
            some += posts_of(posts, keys[number], post, state.request.prompt_token_ids, text)
        if some:
            whose = Whose(state.namespace, state.owner, self._chunk, state.chunk_s,
                          state.hints.priority, state.hints.tiers)  # fmt: skip
            self._signing.write(client, posts, whose, some)

    def withdraw(self) -> list[BlockRemoved]:
        """Of what vLLM has published of blended requests: that it is nobody's."""
        return self._withdrawn.take() if self._withdrawn is not None else []

    def close(self) -> None:
        """Write no more. Repeatable."""
        self._signing.close()

    # how

    def _search(self, state: RequestState, wanted: Named, num_computed: int, *, busy: bool) -> bool:
        """Look for the texts behind the exact head; True: nothing is waited for any more."""
        client, deadline = self._lookups.attached(), self._config.deadlines.request
        if wanted.search is None:
            wanted.why = "no node" if client is None else self._plan(state, wanted)
            if wanted.why or client is None:
                return True
            head = max(num_computed, state.num_whole * self._chunk)
            end = min(state.hints.load_limit, self._end(state.request.num_tokens))
            keys = self._keys(state, wanted)
            question = Question(
                self._lookups.parts, self._lookups.orders, self._lookups.lengths,
                state.owner, state.namespace, state.chunk_s, state.hints.tiers,
            )  # fmt: skip
            assert wanted.posts is not None
            texts = looked_for(
                wanted.posts, keys, state.request.prompt_token_ids, wanted.texts,
                range(head, end), places=wanted.rule.plan == "anchors",
            )  # fmt: skip
            try:
                wanted.search = Search(client, wanted.posts, question, texts)
            except KVStrataError as error:
                wanted.why = f"the texts were not looked for: {error}"
                return True
        search = wanted.search
        if not self._holds(search):
            self._drop(wanted, "the node has gone")
            return True
        done = search.go_on()
        if not done and (not busy or wanted.num_waits < MAX_WAITS):
            wanted.num_waits += 1
            began = self._pace.clock()
            done = search.go_on(self._pace.patience_s(busy=busy))
            self._pace.waited(self._pace.clock() - began)
        if not done:
            if not search.older_than(deadline):
                return False
            search.stop()
        self._make(state, wanted, search, num_computed)
        return True

    def _plan(self, state: RequestState, wanted: Named) -> str:
        """Decide which tokens are to be computed anew; why nothing is blended, or ""."""
        if not self.proven:
            return self._off or NOT_YET
        asked = wanted.asked
        if asked.plan is not None:
            wanted.rule = asked.rule
            return ""
        assert asked.quality is not None
        weights = self._lookups.namespaces.weights_of(state.request)
        if not weights:
            return "the model's weights are not those on disk, so no table is of them"
        chosen = self._choose(weights, asked.quality)
        if isinstance(chosen, str):
            return chosen
        wanted.rule = chosen
        return ""

    def _make(self, state: RequestState, wanted: Named, search: Search, num_computed: int) -> None:
        """Put the prompt together of what was found, and keep it apart from others."""
        head = max(num_computed, state.num_whole * self._chunk)
        most = min(state.hints.load_limit, self._end(state.request.num_tokens))
        found = Assembly(state.request.prompt_token_ids, state.keys, self._chunk,
                         len(self._lookups.parts), head, most)  # fmt: skip
        found.add(search.texts)
        first = found.first
        if first == most:
            self._drop(wanted, "none of its texts was found")
            return
        if not may_be_poisoned(state.request, first, self._hash_tokens):
            self._drop(wanted, "vLLM has no hash where it begins")
            return
        pieces = [run[0] for run in found.runs]
        last = pieces[-1].position + pieces[-1].count
        end = min(-(-last // self._block) * self._block, self._end(state.request.num_tokens))
        count = sum(piece.count for piece in pieces if piece.position >= first)
        wanted.made = Made(found.runs, found.sources, found.weights, found.tiers, first, end, count)
        # Before vLLM hears of it: whatever becomes of it, it is exact no more.
        state.taint = first
        poison(state.request, first, self._hash_tokens)
        if self._withdrawn is not None:
            self._withdrawn.begin(state.request, first)

    def _end(self, num_tokens: int) -> int:
        """Where a load may end at the latest: vLLM computes at least one token."""
        return int(num_tokens - 1) // self._block * self._block

    def _keys(self, state: RequestState, wanted: Named) -> list[bytes]:
        """Keys of the texts' signposts; the request's namespace must be known."""
        if wanted.posts is None:
            client = self._lookups.client
            assert client is not None
            salt = state.request.cache_salt or ""
            wanted.posts = Signposts(client.hello.secret, state.namespace, self._chunk, salt)
            tokens = state.request.prompt_token_ids
            wanted.keys = [
                wanted.posts.key(tokens[text.start : text.stop]) for text in wanted.texts
            ]
        return wanted.keys

    def _holds(self, search: Search) -> bool:
        """Whether what a search has leased is still held: leases die with their node."""
        client = self._lookups.client
        return client is not None and client.alive and client.hello.node == search.node

    def _drop(self, wanted: Named, why: str) -> None:
        wanted.why = why
        if wanted.search is not None:
            wanted.search.give_up()
            wanted.search = None

    def _refuse(self, why: str) -> None:
        self._off = f"blending is off: {why}"
        self.proven = False
        logger.warning("KVStrata blends nothing (blend = on): %s", why)


def _choose(weights: str, quality: str) -> Rule | str:
    return pick_blend(weights, Bound.parse(quality))
