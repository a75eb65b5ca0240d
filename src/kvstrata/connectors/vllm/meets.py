"""Whether loads are computed from the front while they arrive: asked for, possible, and proven.

The scheduler's part of `meeting`. It asks for nothing before every worker has computed the
beginning of a prompt besides the engine, and found it to be the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kvstrata.connectors.vllm.groups import Groups
from kvstrata.connectors.vllm.messages import Front, Load, Trial, WorkerHello
from kvstrata.connectors.vllm.requests import RequestState

logger = logging.getLogger(__name__)

#: a prompt's beginning that the forward is tried on
LEAST_TRIAL_TOKENS, MOST_TRIAL_TOKENS = 64, 512


def trial_of(state: RequestState, step: range, resolve: Any, groups: Groups) -> Trial | None:
    """What of a step's tokens to try the workers' forward on; None: nothing.

    Args:
        state: of a request.
        step: the tokens that it computes.
        resolve: vLLM's own, gives a request's blocks.
        groups: the engine's.
    """
    block = groups.each[0].block_tokens
    count = min(len(step), state.request.num_prompt_tokens, MOST_TRIAL_TOKENS) // block * block
    if step.start or count < LEAST_TRIAL_TOKENS:
        return None
    if state.request.mm_features or state.request.lora_request is not None:
        return None
    ids = resolve.get_block_ids(state.request.request_id)[0]
    tokens = list(state.request.all_token_ids[:count])
    return Trial(tokens, list(ids[: count // block]))


class Meets:
    """Lives on the scheduler's one thread.

    Args:
        wanted: whether the configuration asks for it.
        groups: the engine's.
    """

    def __init__(self, wanted: bool, groups: Groups) -> None:
        self._possible = wanted
        self._groups = groups
        self.proven = False

    def introduce(self, hellos: Sequence[WorkerHello]) -> None:
        """Learn whether the workers can."""
        why = next((hello.no_fronts for hello in hellos if hello.no_fronts), "")
        if self._possible and why:
            self._refuse(why)

    @property
    def untried(self) -> bool:
        """Whether the workers are to show that they can."""
        return self._possible and not self.proven

    def hear(self, tried: str | None) -> None:
        """What the workers' trial said, if there was one."""
        if tried and self._possible:
            self._refuse(f"its forward failed the test: {tried}")
        elif tried is not None and self.untried:
            self.proven = True
            logger.info("KVStrata computes from the front while loads arrive from the end")

    def may_ask(self, state: RequestState) -> bool:
        """Whether the node may plan that a request is computed and loaded from both ends."""
        return self.proven and not state.roles.peer and not state.request.mm_features

    def front(self, state: RequestState, load: Load, blocks: Any, end: int) -> Front | None:
        """What the workers may compute of a load; None: it is loaded as ever.

        Args:
            state: of the request.
            load: in the background.
            blocks: the request's, as vLLM gives them.
            end: of the load, in tokens from the prompt's beginning.
        """
        block, chunk = self._groups.each[0].block_tokens, self._groups.chunk_tokens
        if (
            state.reckoned is None
            or not state.reckoned.meet
            or not self.proven
            or state.sync
            or state.by_other
            or load.tail_tokens
            or not load.keys
            or end % chunk
            or state.local_tokens % block
        ):
            return None
        ids = blocks.get_block_ids()[0]
        tokens = list(state.request.all_token_ids[:end])
        return Front(tokens, list(ids[: end // block]), state.local_tokens)

    def _refuse(self, why: str) -> None:
        self._possible = self.proven = False
        logger.warning("KVStrata computes nothing while loads arrive (meet = on): %s", why)
