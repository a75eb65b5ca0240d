"""What computes tokens besides a worker's steps, in the rig's arithmetic; tests can look in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tests.connector.fake_model import BLOCK, Memory, digests

from kvstrata.connectors.vllm.fronts import Fronts
from kvstrata.connectors.vllm.messages import Trial

if TYPE_CHECKING:
    from tests.connector.rig import Rig


class FakeForward:
    """Writes what the model would; raises if what it attends to is not there."""

    def __init__(self, rig: Rig, memory: Memory) -> None:
        self.computed: list[range] = []  # positions, call by call
        self.before: Callable[[], None] = lambda: None  # called when one begins
        self.most_tokens = 2048
        self._rig, self._memory = rig, memory

    def left(self, num_tokens: int) -> int:
        return self.most_tokens - num_tokens

    def agree(self, numbers: list[int]) -> list[int]:
        return numbers

    def compute(self, tokens: Sequence[int], positions: range, blocks: Sequence[int]) -> None:
        self.before()
        start, stop = positions.start, positions.stop
        (prompt,) = {
            tuple(asked[:stop])
            for name, asked in self._rig.tokens.items()
            if name in self._rig.scheduler.requests
            and self._rig.blocks_of(name)[: len(blocks)] == list(blocks)
        }
        assert prompt[start:] == tuple(tokens)
        group = self._rig.groups.each[0]
        wanted = self._memory.wanted(digests(prompt), group)
        at = np.arange(stop)
        where, within = np.array(blocks)[at // BLOCK], at % BLOCK
        kv = self._memory.of(group)
        assert (kv[:, where[:start], within[:start]] == wanted[:, :start]).all(), "a wrong prefix"
        kv[:, where[start:], within[start:]] = wanted[:, start:]
        self.computed.append(positions)


class FakeProof:
    """Says what a test has it say."""

    def __init__(self) -> None:
        self.why = ""
        self.trials: list[Trial] = []

    def fails(self, forward: object, trial: Trial) -> str:
        self.trials.append(trial)
        return self.why


def fronts(rig: Rig, memory: Memory, chunk_tokens: int) -> Fronts:
    """For one of the rig's workers."""
    rig.forward, rig.proof = FakeForward(rig, memory), FakeProof()
    return Fronts(rig.forward, rig.proof, chunk_tokens)  # type: ignore[arg-type]
