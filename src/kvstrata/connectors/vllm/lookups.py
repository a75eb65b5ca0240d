"""What the node has of each request: who asks, how long that may take, and the leases that hold it.

A lookup begins with a request's keys, goes to the node as one match, and ends with a lease on the
chunks that were found, or without one. Nothing here knows what becomes of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence, Set
from typing import Any

from msgspec.structs import replace

from kvstrata.config import Config
from kvstrata.config.tracing import open_tracer
from kvstrata.connectors.identity import explain_auto
from kvstrata.connectors.link import Link
from kvstrata.connectors.vllm import beginnings, elsewhere
from kvstrata.connectors.vllm.events import Events, NodeWatch
from kvstrata.connectors.vllm.fingerprint import Namespaces
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.messages import WorkerHello
from kvstrata.connectors.vllm.pace import Pace
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import KVStrataError, NodeUnavailable
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.observe.reasons import Why
from kvstrata.pagekeys import chain_of
from kvstrata.parts import PORTABLE
from kvstrata.secret import secret_check
from kvstrata.wire import protocol as p
from kvstrata.wire.client import Call, NodeClient, offsets_of

logger = logging.getLogger(__name__)

#: requests that have not been scheduled yet and hold a lease, at most; the others ask in their turn
LOOK_AHEAD = 8
#: how long the start waits for the weights' identity; later requests wait for nothing
IDENTITY_WAIT_S = 10.0


class Lookups:
    """Asks the node on behalf of requests; lives on the scheduler's one thread.

    Args:
        vllm_config: the engine's configuration.
        config: KVStrata's.
        groups: the engine's KV cache groups, and the chunks they are cut into.
        pace: of the engine's steps, which says how long a match may be waited for.
        states: all requests.
        loading: those of them whose lease the workers use, so that it is not given up here.
        events: that vLLM publishes, if it does.
        may_meet: says whether a request may be computed from the front while it is loaded.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: Config,
        groups: Groups,
        pace: Pace,
        states: Mapping[str, RequestState],
        loading: Container[str],
        events: Events | None = None,
        may_meet: Callable[[RequestState], bool] = lambda state: False,
    ) -> None:
        self._config = config
        self._may_meet = may_meet
        self._groups = groups
        self._chunk = groups.chunk_tokens
        self._model = vllm_config.model_config.model
        self._states = states
        self._loading = loading
        self._link = Link(config, "scheduler")
        self._link.start()
        self.pace = pace
        self.tracer = open_tracer(config.tracing, "kvstrata-engine")
        self.events = events
        self._watch = None if events is None else NodeWatch(config, events)
        #: the node, if there was one when it was needed last
        self.client: NodeClient | None = None
        self.namespaces = Namespaces(vllm_config, groups.chunk_tokens, config.tenant)
        self._told: set[tuple[bytes, Namespace]] = set()
        #: the byte orders that the workers read, the parts of a chunk; of each its bytes, and how
        #: many of the last chunks a boundary needs (none given: every one of each)
        self.orders: list[str] = []
        self.parts: list[int] = []
        self.lengths: list[int] = []
        self.needs: list[int] = []
        self._owners: list[Group] = []  # of each part that of vLLM's groups which it is of
        self.num_workers = 0
        #: requests that have asked or hold a lease, and have not been scheduled
        self.looking: set[str] = set()

    def learn(self, ranked: Sequence[WorkerHello], layout: str) -> bool:
        """Learn what the workers' objects are; whether that is what was known before.

        Raises:
            Exception: whatever keeps the model from being identified.
        """
        before = self.orders, self.parts, self.lengths
        # What several ranks hold alike is one part.
        held = {one.part: one for hello in ranked for one in hello.held}
        self.parts = sorted(held)
        each = [held[part] for part in self.parts]
        self._owners = [self._groups.each[one.table] for one in each]
        self.orders = [*dict.fromkeys(one.order for one in each), PORTABLE]
        self.lengths = [one.payload_bytes for one in each]
        self.needs = [one.needs for one in each] if any(one.needs for one in each) else []
        self.num_workers = len(ranked)
        if "engines" in self._config.share:
            self.namespaces.share(self._groups, [hello.layout for hello in ranked])
        self.namespaces.identify(layout, IDENTITY_WAIT_S, ranked[0].slices)
        self.namespaces.when_weighed(
            lambda weights: explain_auto(self._config, self._model, weights)
        )
        self._link.wait(self._config.deadlines.attach)
        if self.events is not None and self._watch is not None:
            table = self.events.group
            self.events.learn(one.part for one in each if one.table == table)
            self._watch.start()
        return before == (self.orders, self.parts, self.lengths)

    def renew(self) -> None:
        """Begin a new namespace: nothing that was stored so far is found again."""
        self.namespaces.renew()
        if self.events is not None:
            self.events.forget_all()

    def attached(self) -> NodeClient | None:
        """The node, if there is one now; begins to look for one if not."""
        if self.client is not None and not self.client.alive:
            logger.warning("KVStrata: the node is gone; the engine computes everything")
            self.client.close()
            self.client = None
            self.looking.clear()
            # Leases died with their node, also those of answers that nobody has heard yet. Loads
            # in the workers' hands end by themselves.
            for state in self._states.values():
                state.lease = 0
                self.abandon(state)
                if state.request.request_id not in self._loading:
                    state.forget_match()
        if self.client is None:
            self.client = self._link.take()
            if self.client is None:
                self._link.start()
        return self.client

    def compare(self, nodes: Set[bytes]) -> None:
        """Where workers are attached to another node, this one may have gone without a word."""
        if self.client is not None and nodes - {self.client.hello.node, b""}:
            self.client.look()

    def crowded(self) -> bool:
        """Whether enough requests look ahead; one that vLLM passes over does not count for long."""
        if len(self.looking) < LOOK_AHEAD:
            return False
        since = time.monotonic() - self._config.deadlines.request
        return sum(self._states[name].seen_at > since for name in self.looking) >= LOOK_AHEAD

    def ask(self, state: RequestState) -> bool:
        """Begin a request's match; False while its adapter is still being identified."""
        client = self.attached()
        state.miss, state.trouble = "", None
        if client is None:
            state.matched = True
            state.missed(Why.NO_NODE, "no node")
            return True
        if state.chain is None and not self._identify(state, client):
            return state.matched
        state.rehash()
        if not state.asked:
            state.miss = "left out by a hint" if state.left_out else "shorter than a chunk"
            state.matched = not self._ask_inside(state)
            return True
        self._begin(state, client, by_other=state.other_first)
        return True

    def answered(self, state: RequestState, *, busy: bool) -> bool:
        """Take in a match's answer; False if it has not come and may still.

        Args:
            busy: whether requests run that a wait would hold up.
        """
        while state.call is not None:
            try:
                if not state.call.ready():
                    self._wait(state, busy)
                if state.call.reply is not None:
                    self._hear(state, state.call)
                    self._go_on(state)
                elif state.asked_inside and busy and not self._is_worth_a_step(state):
                    self.abandon(state)
                elif time.monotonic() - state.asked_at < self._config.deadlines.request:
                    return False
                else:
                    self.abandon(state)
                    if state.reckoned is None:
                        state.trouble = Why.DEADLINE
                    if not state.asked_inside:
                        state.miss = "the match missed its deadline"
            except KVStrataError as error:
                state.call = None
                state.missed(Why.FAILED, f"the match failed: {error}")
        state.matched = True
        if not state.lease:
            self.looking.discard(state.request.request_id)
        return True

    def let_be(self, state: RequestState) -> None:
        """vLLM has every whole chunk itself: wait for nothing, and hold nothing."""
        client = self.attached()
        if state.chain is None and client is not None:
            self._identify(state, client)
        with contextlib.suppress(KVStrataError):
            if state.call is not None and state.call.ready():
                self._hear(state, state.call)
                # What the node has need not be stored again.
                state.num_stored = max(state.num_stored, state.num_kept)
        self.give_up(state)

    def give_up(self, state: RequestState) -> None:
        """Let go of what a request asked for or found."""
        self.looking.discard(state.request.request_id)
        self.abandon(state)
        if state.lease and self.client is not None:
            self.client.release(state.lease)
        state.forget_match()

    def abandon(self, state: RequestState) -> None:
        """Wait no longer for a request's match; a lease that it has stays."""
        if state.call is not None:
            state.call.abandon()
            state.call = None
            state.looked_up("given up")

    def close(self) -> None:
        """Let go of the node. Repeatable."""
        self.namespaces.close()
        if self.tracer is not None:
            self.tracer.close()
        self._link.close()
        if self._watch is not None:
            self._watch.close()
        if self.client is not None:
            self.client.close()
            self.client = None

    # how

    def _begin(self, state: RequestState, client: NodeClient, *, by_other: bool) -> None:
        """Ask the node for a request's keys, those of the one secret or of the other."""
        state.by_other = by_other
        state.question = state.asked_by_other if by_other else state.asked
        token_s, pair_s = self.pace.computing.speeds()
        state.chunk_s, state.pair_s = token_s * self._chunk, pair_s * self._chunk**2
        wait_s = 0.0
        if by_other == state.other_first:
            wait_s = elsewhere.expected_s(state, self._groups, self._config.deadlines)
        state.expects_end = bool(wait_s) and not self._groups.prefix_only
        tail = elsewhere.tail_lengths(state, self._groups, self._owners, self.lengths)
        try:
            state.call = client.match(
                state.question, self.parts, self.orders, self.lengths,
                state.other_owner if by_other else state.owner, state.namespace,
                state.chunk_s, state.pair_s, state.roles.peer,
                wait_s,
                tail,
                b"" if by_other else state.heads_by(client.hello.secret),
                state.look_up(),
                state.hints.tiers,
                self.needs,
                not by_other and self._may_meet(state),
            )  # fmt: skip
            self.looking.add(state.request.request_id)
            state.seen_at = time.monotonic()
        except NodeUnavailable:
            state.matched = True
            state.missed(Why.NO_NODE, "no node")
        state.asked_at = time.monotonic()

    def _hear(self, state: RequestState, call: Call) -> None:
        """Take in an answer, unless the one before it found as much.

        Raises:
            KVStrataError: there is none.
        """
        state.call = None
        if state.asked_inside:
            beginnings.hear(state, call, self.client)
            return
        reply: p.Matched = call.wait(0)
        if not state.by_other:
            state.num_kept = min(len(reply.tiers), len(state.keys))
        is_second = state.by_other != state.other_first
        left_out = state.lease
        if is_second and len(reply.tiers) <= len(state.tiers):
            left_out = reply.lease
        else:
            state.lease, state.tiers, state.found = reply.lease, reply.tiers, state.question
            state.offsets = offsets_of(reply.offsets)
            state.reckoned = reply
            state.peer_refused = reply.peer_refused
            state.why = reply.why
            state.miss, state.trouble = "", None
            if len(reply.tiers) < reply.found:
                state.miss = "computing is faster"
            elif len(reply.tiers) < len(state.question):
                state.miss = "not stored" if not reply.tiers else "partly stored"
            elif state.left_out:
                state.miss = "left out by a hint"
        if self.client is not None:
            self.client.release(left_out)
            if self.events is not None and not state.by_other:
                names = ["host", *self.client.hello.tiers]
                self.events.found(state, [names[tier] for tier in reply.tiers])
        state.looked_up()

    def _go_on(self, state: RequestState) -> None:
        """Ask for the keys of the other secret, too, where those of the one are not all there."""
        if (
            state.other_chain is not None
            and state.by_other == state.other_first
            and self.client is not None
            and state.reckoned is not None
            and state.reckoned.found < len(state.question)
        ):
            self._begin(state, self.client, by_other=not state.by_other)
        else:
            self._ask_inside(state)

    def _ask_inside(self, state: RequestState) -> bool:
        """Ask what begins as a prompt goes on behind what was found; whether that was of use."""
        if self.client is None or not beginnings.is_next(state):
            return False
        token_s, pair_s = self.pace.computing.speeds()
        with contextlib.suppress(NodeUnavailable):
            state.call = beginnings.ask(
                state, self.client, self.parts, self.orders, self.lengths, self.needs,
                self._groups, self._owners, token_s + pair_s * len(state.tiers) * self._chunk,
            )  # fmt: skip
            state.asked_inside = True
            state.asked_at = state.seen_at = time.monotonic()
            self.looking.add(state.request.request_id)
        return state.asked_inside

    def _is_worth_a_step(self, state: RequestState) -> bool:
        """Whether what is inside may save more than the step that it costs to ask again."""
        return self.pace.computing.speeds()[0] * beginnings.num_tokens(state) > self.pace.step_s()

    def _identify(self, state: RequestState, client: NodeClient) -> bool:
        """Make a request's keys possible; False while its adapter is unknown, or for good."""
        try:
            parts = self.namespaces.parts_of(state.request)
            if parts is None:
                return False
            state.namespace = parts.digest()
            state.engines = parts.pages
            state.hints = state.hints.on(["host", *client.hello.tiers])
            salt = state.request.cache_salt or ""
            state.owner, state.chain = self._derive(client.hello.secret, parts, salt)
            for other in client.hello.secrets[1:]:
                state.other_owner, state.other_chain = self._derive(other, parts, salt)
                state.other_first = secret_check(other) == state.roles.secret
            self._tell(client, parts)
        except (KVStrataError, OSError) as error:
            state.bypass = f"an identity is missing: {error}"
            state.matched = True
            return False
        return True

    def _derive(self, secret: bytes, parts: Namespace, salt: str) -> tuple[bytes, KeyChain]:
        """Whose a request's objects are by a secret, and what makes their keys."""
        owner = owner_digest(secret, self._config.tenant, salt)
        return owner, chain_of(secret, parts.digest(), self._chunk, salt, pages=parts.pages)

    def _tell(self, client: NodeClient, parts: Namespace) -> None:
        """Tell a node, once, what a namespace is made of: so an operator can compare two nodes."""
        if (told := (client.hello.node, parts)) in self._told:
            return
        if (described := self.namespaces.describe(parts)) is not None:
            self._told.add(told)
            described = replace(
                described, orders=self.orders, objects=self.parts, needs=self.needs,
                lengths=self.lengths,
            )  # fmt: skip
            with contextlib.suppress(KVStrataError):  # a request is served without it
                client.record(described.record())

    def _wait(self, state: RequestState, busy: bool) -> None:
        """Wait for a match as long as that costs less than to ask again a step later."""
        patience = self.pace.patience_s(busy=busy)
        # Whoever runs is held up once by a match, not in every step by a node that hangs.
        may_not = busy and state.waited and not state.asked_inside
        if state.call is None or self.client is None or not patience or may_not:
            return
        state.waited = True
        begun = self.pace.clock()
        try:
            self.client.pump(state.call, patience)
        finally:
            self.pace.waited(self.pace.clock() - begun)
