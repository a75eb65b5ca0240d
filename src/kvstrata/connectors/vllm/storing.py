"""What of a request is stored, and what another engine is told that goes on with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from kvstrata.connectors.naming import decode_elsewhere
from kvstrata.connectors.vllm.groups import NULL_BLOCK, Group, Groups
from kvstrata.connectors.vllm.lookups import Lookups
from kvstrata.connectors.vllm.messages import Store
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import KVStrataError
from kvstrata.header import MARK_TOKENS
from kvstrata.secret import secret_check
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)


class Stores:
    """Describes stores for the workers.

    Args:
        lookups: know the node, and who the model is.
        groups: the engine's KV cache groups, and the chunks they are cut into.
    """

    def __init__(self, lookups: Lookups, groups: Groups) -> None:
        self._lookups = lookups
        self._groups = groups
        self._chunk = groups.chunk_tokens
        self._told = False  # that nobody can be told where this node is

    def of_step(self, state: RequestState, step: range, known: int, resolve: Any) -> list[Store]:
        """What is to be stored after a step.

        Args:
            state: of the request.
            step: the tokens that it computes.
            known: tokens whose KV is there after the step, and whose ids are known.
            resolve: vLLM's own, gives a request's blocks, and those that hold a state.
        """
        known = min(known, state.store_limit)
        whole, end = known // self._chunk > state.num_stored, self._end_is_next(state, known)
        stores = self._states(state, step, known, resolve) if self._groups.stateful else []
        if not (whole or end):
            return stores
        block_ids = resolve.get_block_ids(state.request.request_id)
        if whole:
            stores += self.whole(state, known // self._chunk, block_ids)
        if end:
            stores += self._tail(state, state.request.num_prompt_tokens, block_ids)
        return stores

    def whole(
        self, state: RequestState, done: int, block_ids: Sequence[Sequence[int]]
    ) -> list[Store]:
        """Store the chunks from the first unstored one up to number ``done``.

        Of a group that lets go of blocks, those are stored that vLLM still has all blocks of.

        Args:
            block_ids: the request's, of each group from its first token on.
        """
        state.rehash()
        first = state.num_stored
        if self._lookups.events is not None:
            self._lookups.events.note(state, first, done)
        state.num_stored = done
        state.stored_chunks += done - first
        marks: dict[range, bytes] = {}  # depend on tokens alone, so groups share them
        stores = []
        for group, ids in zip(self._groups.each, block_ids, strict=True):
            if group.kind == "recurrent":
                continue
            for run in self._groups.stored(group, ids, first, done):
                if run not in marks:
                    marks[run] = self._marks(state, run, run.stop * self._chunk)
                stores.append(self._store(state, group, run, ids, marks[run]))
        return stores

    def _states(self, state: RequestState, step: range, known: int, resolve: Any) -> list[Store]:
        """Store the states that are there after this step, each at the end of a chunk.

        vLLM's block p keeps the state after the block's last token if a step ended there. It is
        there for another step, in which a token may be known that was not. Besides vLLM offers
        those that its kernels make within a step: group, block, number of tokens.
        """
        name, size = state.request.request_id, self._chunk
        ends = {step.stop, *({step.start} if step.start == state.step_end else ())}
        state.step_end = step.stop
        ends = {end for end in ends if end and end % size == 0}
        offers = {
            (group, tokens): block
            for group, block, tokens in resolve.boundary_state_offloads.get(name, ())
        }
        block_ids = resolve.get_block_ids(name) if ends else ()
        for group, ids in zip(self._groups.each, block_ids, strict=False):
            if group.kind == "recurrent":
                offers |= {(group.index, end): ids[end // group.block_tokens - 1] for end in ends}
        fitting = {
            where: block
            for where, block in offers.items()
            if where[1] % size == 0
            and state.num_states * size < where[1] <= known
            and block != NULL_BLOCK
        }
        if fitting:
            state.rehash()
            state.num_states = max(tokens for _, tokens in fitting) // size
        return [
            self._store(
                state, self._groups.each[index], range(done - 1, done), [block], before=done - 1
            )
            for (index, tokens), block in sorted(fitting.items())
            for done in [tokens // size]
        ]

    def _store(
        self,
        state: RequestState,
        group: Group,
        run: range,
        ids: Sequence[int],
        marks: bytes = b"",
        before: int = 0,
    ) -> Store:
        """Store a run of whole chunks of one group; ``ids`` begin at chunk number ``before``."""
        width, prefix = self._groups.width(group), state.keys[: run.stop]
        blocks = ids[(run.start - before) * width : (run.stop - before) * width]
        return self._described(state, group, prefix, run.start, blocks, marks)

    def _described(
        self,
        state: RequestState,
        group: Group,
        prefix: list[bytes],
        first: int,
        blocks: Sequence[int],
        marks: bytes,
        tail_tokens: int = 0,
    ) -> Store:
        return Store(
            namespace=state.namespace,
            prefix=prefix,
            first=first,
            blocks=list(blocks),
            group=group.index,
            weights=self._lookups.namespaces.weights_of(state.request),
            owner=state.owner,
            priority=state.hints.priority,
            tiers=state.hints.tiers,
            tail_tokens=tail_tokens,
            lend=state.roles.lends,
            given=state.num_given,
            trace=state.trace,
            marks=marks,
        )

    def _marks(self, state: RequestState, run: range, stop: int) -> bytes:
        """Of the chunks of a run, as far as they lie before a position."""
        return state.marks(run, stop) if state.inside else b""

    def _end_is_next(self, state: RequestState, known: int) -> bool:
        """Whether a prompt's end is computed in this step, and nothing behind it ever here."""
        return (
            bool(state.tail)
            and state.roles.lends
            and not state.tail_stored
            and known >= state.request.num_prompt_tokens
            and state.request.max_tokens == 1
        )

    def last(
        self, state: RequestState, known: int, block_ids: Sequence[Sequence[int]]
    ) -> list[Store]:
        """Store the end of a request that has ended, if it fills no chunk and can be found again.

        Args:
            known: as of `of_step`.
            block_ids: the request's, of each group; a state has no end shorter than a chunk.
        """
        if not state.inside or state.tail_stored or state.taint is not None:
            return []
        if known % self._chunk < MARK_TOKENS:
            return []
        return self._tail(state, known, block_ids)

    def _tail(
        self, state: RequestState, stop: int, block_ids: Sequence[Sequence[int]]
    ) -> list[Store]:
        """Store what lies between the last whole chunk before a position and this, of all groups.

        Nothing where vLLM has let go of some of it, for half of a tail is of no use.
        """
        state.rehash()
        state.tail_stored = True
        whole, stores = stop // self._chunk, list[Store]()
        prefix = [*state.keys[:whole], state.end_at(stop)]
        marks = self._marks(state, range(whole, whole + 1), stop)
        for group, ids in zip(self._groups.each, block_ids, strict=True):
            first = whole * self._groups.width(group)
            last = -(-stop // group.block_tokens)
            blocks = ids[first:last]
            if len(blocks) < last - first or NULL_BLOCK in blocks:
                return []
            store = self._described(state, group, prefix, whole, blocks, marks, stop % self._chunk)
            stores.append(store)
        return stores

    def pin(self, state: RequestState) -> None:
        """Have what a request stored or hit stay, if it asks for that; waits for no answer.

        What its workers have yet to store is kept from when it is there.
        """
        client, keys = self._lookups.client, state.keys[: state.num_stored]
        if not state.hints.pin_s or not keys or client is None:
            return
        name = state.hints.pin_name(keys[-1])
        with contextlib.suppress(KVStrataError):  # it is an ordinary entry then
            client.send(p.Pin(0, b"".join(keys), state.owner, name, float(state.hints.pin_s)))

    def elsewhere(self, state: RequestState) -> dict[str, Any] | None:
        """What another engine needs to go on with a request that ended well."""
        client, request = self._lookups.client, state.request
        if not state.roles.lends or state.chain is None or client is None:
            return None
        if not request.status.name.endswith(("_STOPPED", "_LENGTH_CAPPED")):
            return None
        if not client.hello.address:
            if not self._told:
                self._told = True
                logger.warning(
                    "KVStrata: a request is to be decoded elsewhere, but this node answers no "
                    "others: set network.listen, or network.advertise where that is all networks"
                )
            return None
        return decode_elsewhere(
            client.hello.address, client.hello.node, request.request_id,
            request.num_prompt_tokens, self._lookups.num_workers, secret_check(client.hello.secret),
        )  # fmt: skip


def part_at(state: RequestState, chunk_tokens: int) -> None:
    """Have vLLM end a step where a prompt parts from a stored one, so that a state is kept there.

    Attention is stored up to that place, states most often not. vLLM does the same for what its own
    prefix cache has, by the same number, which it sets anew before each question of this kind.
    """
    request, reckoned = state.request, state.reckoned
    place = 0 if reckoned is None else reckoned.end * chunk_tokens
    if place > getattr(request, "shared_prefix_boundary", place):
        request.shared_prefix_boundary = place
