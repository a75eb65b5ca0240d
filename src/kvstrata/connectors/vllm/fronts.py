"""What a worker computes of loads: a forward, the proofs that it is right, what is under way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.connectors.vllm.blends import Blends, Deviates, Ended
from kvstrata.connectors.vllm.deviation import Check
from kvstrata.connectors.vllm.engine import Forward, find_model
from kvstrata.connectors.vllm.meeting import Meeting, Meetings
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.pages import Pages, attention_layers
from kvstrata.connectors.vllm.rotary import Rotary, find_rotary
from kvstrata.connectors.vllm.trial import Proof
from kvstrata.connectors.vllm.turns import TurningProof
from kvstrata.errors import Incompatible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turning:
    """What it takes to blend.

    Args:
        rotary: what the keys are turned by.
        proof: says whether that is right.
        check: says how far reused rows are off.
    """

    rotary: Sequence[Rotary]
    proof: TurningProof
    check: Deviates


class Fronts:
    """One worker's; on the engine's main thread. Its ranks do the same in the same steps.

    Args:
        forward: computes tokens.
        proof: says whether it does so rightly.
        chunk_tokens: of a chunk.
        turning: for blends; None, or why not: nothing is blended.
    """

    def __init__(
        self,
        forward: Forward,
        proof: Proof,
        chunk_tokens: int,
        turning: Turning | str | None = None,
    ) -> None:
        self.meetings = Meetings(forward, chunk_tokens)
        self.turning = turning if isinstance(turning, Turning) else None
        self.no_blends = turning if isinstance(turning, str) else ""
        self.blends = Blends(forward, self.turning.check) if self.turning is not None else None
        self._forward, self._proof = forward, proof
        self._proven: str | None = None  # why nothing is computed; "": it is
        self._tried: str | None = None
        self._turned: str | None = None
        self._met: dict[str, int] = {}
        self._blended: dict[str, int] = {}

    def prove(self, trial: Trial) -> None:
        """Try the forward on what the engine has just computed; the first time only."""
        if self._proven is not None:
            return
        self._proven = self._tried = self._why_not(self._proof, trial)
        if self.turning is not None:
            self._turned = self._proven or self._why_not(self.turning.proof, trial)

    def _why_not(self, proof: Proof | TurningProof, trial: Trial) -> str:
        """What a proof says, to all ranks."""
        try:
            why = proof.fails(self._forward, trial)
        except Exception as error:
            logger.exception("KVStrata: computing inside a load failed its test")
            why = str(error) or type(error).__name__
        (fails,) = self._forward.agree([bool(why)])
        return why or ("another rank's test failed" if fails else "")

    def step(self, num_tokens: int) -> tuple[list[Meeting], list[Ended], bool]:
        """Compute a slice of a load, if one waits for that.

        Args:
            num_tokens: that the engine itself has computed in this step.
        Returns:
            Loads that have ended, blends that have, and whether anything was computed.
        """
        met: list[Meeting] = []
        ended: list[Ended] = []
        left, computed = self._forward.left(num_tokens), False
        if self.meetings:
            met, computed = self.meetings.step(left)
        if self.blends:
            ended, more = self.blends.step(0 if computed else left)
            computed = computed or more
        for meeting in met:
            self._met[meeting.load.request_id] = meeting.computed
        for blend in ended:
            if not blend.failed:
                self._blended[blend.request_id] = blend.num_computed
        return met, ended, computed

    def call_off(self, request_ids: set[str]) -> None:
        """These requests have ended. All ranks hear it at once."""
        self.meetings.call_off(request_ids)
        if self.blends is not None:
            self.blends.call_off(request_ids)

    def close(self) -> None:
        """Nothing is computed any more. Repeatable."""
        self.meetings.close()
        if self.blends is not None:
            self.blends.close()

    def report(self) -> dict[str, Any]:
        """What of a `WorkerReport` is known here, by its names."""
        told = {
            "met": self._met,
            "tried": self._tried,
            "blended": self._blended,
            "turned": self._turned,
        }
        self._met, self._blended = {}, {}
        self._tried = self._turned = None
        return told


def fronts_of(
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: Mapping[str, Any],
    pages: Pages,
    chunk_tokens: int,
    *,
    blends: bool,
) -> Fronts:
    """What a worker can compute; to be called by what vLLM's runner calls, best on its stack.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: its one group.
        kv_caches: its tensors by layer.
        pages: of the group.
        chunk_tokens: of a chunk.
        blends: whether to blend, too, if that can be.

    Raises:
        Incompatible: nothing.
    """
    layers = attention_layers(pages, vllm_config)
    model = find_model([*layers.values()])
    forward = Forward(vllm_config, kv_cache_config, pages, model)
    turning: Turning | str | None = None
    if blends:
        try:
            rotary = find_rotary(model, layers, pages.group.head_dim)
            positions = vllm_config.model_config.max_model_len
            proof = TurningProof(pages, kv_caches, rotary, positions)
            turning = Turning(rotary, proof, Check(forward, pages, kv_caches, layers))
        except Incompatible as error:
            turning = str(error)
    return Fronts(forward, Proof(pages, kv_caches), chunk_tokens, turning)
