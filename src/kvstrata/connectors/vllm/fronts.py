"""What a worker computes of loads: a forward, the proof that it is right, the meetings so far."""

from __future__ import annotations

import logging

from kvstrata.connectors.vllm.engine import Forward
from kvstrata.connectors.vllm.meeting import Meeting, Meetings
from kvstrata.connectors.vllm.messages import Trial
from kvstrata.connectors.vllm.trial import Proof

logger = logging.getLogger(__name__)


class Fronts:
    """One worker's; on the engine's main thread. Its ranks do the same in the same steps.

    Args:
        forward: computes tokens.
        proof: says whether it does so rightly.
        chunk_tokens: of a chunk.
    """

    def __init__(self, forward: Forward, proof: Proof, chunk_tokens: int) -> None:
        self.meetings = Meetings(forward, chunk_tokens)
        self._forward, self._proof = forward, proof
        self._proven: str | None = None  # why nothing is computed; "": it is
        self._tried: str | None = None
        self._met: dict[str, int] = {}

    def prove(self, trial: Trial) -> None:
        """Try the forward on what the engine has just computed; the first time only."""
        if self._proven is not None:
            return
        try:
            why = self._proof.fails(self._forward, trial)
        except Exception as error:
            logger.exception("KVStrata: computing inside a load failed its test")
            why = str(error) or type(error).__name__
        (fails,) = self._forward.agree([bool(why)])
        self._proven = self._tried = why or ("another rank's test failed" if fails else "")

    def step(self, num_tokens: int) -> tuple[list[Meeting], bool]:
        """Compute a slice of a load, if one waits for that.

        Args:
            num_tokens: that the engine itself has computed in this step.
        Returns:
            Loads that have ended, and whether anything was computed.
        """
        if not self.meetings:
            return [], False
        ended, computed = self.meetings.step(self._forward.left(num_tokens))
        for meeting in ended:
            self._met[meeting.load.request_id] = meeting.computed
        return ended, computed

    def report(self) -> tuple[dict[str, int], str | None]:
        """Of loads that have ended, the first chunk that was not computed; what a trial said."""
        met, self._met = self._met, {}
        tried, self._tried = self._tried, None
        return met, tried
