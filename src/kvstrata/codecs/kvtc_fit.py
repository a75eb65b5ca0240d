"""How a calibration for `kvtc` is found: components, weights, and the steps of the levels.

The next-token distribution moves by a KL divergence of about half the squared product of an error
with the gradient of a sampled token's log-probability (Fisher information). So a channel's weight
is the root of its mean squared gradient; components are those of the weighted numbers, and one
step for all of them gives the least divergence for the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.codecs import rope
from kvstrata.codecs.calibration import MAX_GROUP, Calibration, Header
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.entropy_models import PLAIN, classify, tables
from kvstrata.errors import UsageError

LEVELS = (2, 3, 4, 5, 6, 8, 11)
"""Half bits per element."""

_SAMPLE_TOKENS = 128  # steps are fitted to chunks of so many
_FLOOR = (
    0.1  # of a weight's square comes from the mean of its layer: gradients are few and heavy-tailed
)
_STREAM_BYTES = 68
_ROUNDS = 8
_MAX_SAMPLES = 4

Halves: TypeAlias = npt.NDArray[np.float16]
Doubles: TypeAlias = npt.NDArray[np.float64]


class Fit:
    """Sums over documents, and from them a calibration.

    Args:
        model: its name, for people.
        frequencies: float64 (L, D/2), radians a token.
        num_heads: H.
    """

    def __init__(self, model: str, frequencies: Doubles, num_heads: int) -> None:
        self._model = model
        self._frequencies = frequencies
        self._heads = num_heads
        self._dim = 2 * frequencies.shape[1]
        heads = max(
            [
                n
                for n in range(1, num_heads + 1)
                if num_heads % n == 0 and n * self._dim <= MAX_GROUP
            ],
            default=1,
        )
        self._group = heads
        layers, width = len(frequencies), heads * self._dim
        groups = num_heads // heads
        self._count = 0
        self._sum = np.zeros((layers, 2, groups, width))
        self._products = np.zeros((layers, 2, groups, width, width))
        self._damage = np.zeros((layers, 2, num_heads, self._dim))
        self._samples: list[Floats] = []

    def add(self, kv: Floats, gradients: Sequence[Floats], start: int) -> None:
        """Take in one document.

        Args:
            kv: float32 (L, 2, H, T, D), keys as they are cached.
            gradients: the same shape each, of log-probabilities of continuations: a sampled token
                at each place. At least one.
            start: position of the first token. Attention sinks are not to be among them: they
                stay exact, and are like no other token.
        """
        numbers = self._turned(kv, start)
        self._count += kv.shape[3]
        self._sum += numbers.sum(3)
        for at in np.ndindex(numbers.shape[:3]):
            self._products[at] += numbers[at].T @ numbers[at]
        for gradient in gradients:
            slopes = self._turned(gradient, start)
            squares = np.einsum("lsgtw,lsgtw->lsgw", slopes, slopes) / len(gradients)
            self._damage += squares.reshape(self._damage.shape)
        if len(self._samples) < _MAX_SAMPLES:
            middle = max(0, kv.shape[3] - _SAMPLE_TOKENS) // 2
            self._samples.append(numbers[:, :, :, middle : middle + _SAMPLE_TOKENS])

    def finish(self) -> Calibration:
        """The calibration of all documents.

        Raises:
            UsageError: there were fewer tokens than channels.
        """
        width = self._sum.shape[-1]
        if self._count < 2 * width:
            raise UsageError(f"{self._count} tokens to calibrate with; {2 * width} are needed")
        mean = self._sum / self._count
        weight = self._weights().reshape(mean.shape)
        basis: Halves = np.empty((*mean.shape, width), np.float16)
        for at in np.ndindex(mean.shape[:3]):
            covariance = self._products[at] / self._count - np.outer(mean[at], mean[at])
            _, vectors = np.linalg.eigh(covariance * np.outer(weight[at], weight[at]))
            basis[at] = vectors[:, ::-1]
        layers = len(mean)
        flat = (layers, 2, self._heads * self._dim)
        narrow_mean, narrow_weight = mean.astype(np.float32), weight.astype(np.float32)
        steps = self._steps(narrow_mean, narrow_weight, basis)
        header = Header(
            self._model, layers, self._heads, self._dim, self._group, self._count, steps
        )
        return Calibration(
            header,
            self._frequencies,
            narrow_mean.reshape(flat),
            narrow_weight.reshape(flat),
            basis,
        )

    def _turned(self, kv: Floats, start: int) -> Floats:
        """Float32 (L, S, G, T, W): keys turned back to position 0, heads side by side."""
        layers, states, heads, count, dim = kv.shape
        out = np.empty((layers, states, count, heads, dim), np.float32)
        for layer, state in np.ndindex(layers, states):
            angles = rope.still(count, dim)
            if state == 0:
                angles = rope.angles(self._frequencies[layer].tobytes(), start, count)
            rope.unrotate(kv[layer, state], angles.cos, angles.sin, out[layer, state])
        grouped = out.reshape(layers, states, count, heads // self._group, self._group * dim)
        return np.ascontiguousarray(grouped.swapaxes(2, 3))

    def _weights(self) -> Doubles:
        """Roots of mean squared gradients, (L, 2, H, D); the channels of a key's pair alike."""
        damage = self._damage / self._count
        half = self._dim // 2
        pairs = damage[:, 0].reshape(len(damage), -1, 2, half).mean(2, keepdims=True)
        damage[:, 0] = np.broadcast_to(pairs, (*pairs.shape[:2], 2, half)).reshape(
            damage[:, 0].shape
        )
        layer_mean = damage.mean((2, 3), keepdims=True)
        # A layer whose gradients are all zero is not used; it still gets a weight above zero.
        least = max(float(layer_mean.max()) * 1e-6, 1e-24)
        weight: Doubles = np.sqrt(np.maximum((1 - _FLOOR) * damage + _FLOOR * layer_mean, least))
        return weight

    def _steps(self, mean: Floats, weight: Floats, basis: Halves) -> dict[str, float]:
        """Of each level the step that spends its bits on the sampled chunks."""
        components = np.ascontiguousarray(basis.swapaxes(-1, -2).astype(np.float32))
        weighted = [(x - mean[..., None, :]) * weight[..., None, :] for x in self._samples]
        rows = np.concatenate([(components @ x.swapaxes(-1, -2)).reshape(-1) for x in weighted])
        rows = rows.reshape(-1, self._samples[0].shape[3])
        num_streams = len(self._samples) * len(mean)
        steps, step = {}, float(rows.std()) or 1.0
        for level in LEVELS:
            for _ in range(_ROUNDS):
                # A bit more halves the step where all components take part, and does more below.
                step *= 2 ** (_bits(rows, step, num_streams) - level / 2)
            steps[str(level)] = step
        return steps


def _bits(rows: Floats, step: float, num_streams: int) -> float:
    """Bits per element that `kvtc` spends on rows of coefficients with this step."""
    symbols = np.clip(np.rint(rows / np.float32(step)), -32000, 32000).astype(np.int16)
    classes = classify(np.ascontiguousarray(symbols.T)[None])
    sizes = np.minimum(np.abs(symbols.astype(np.int32)), 128)
    cost = tables().cost.astype(np.float64) / 256
    cost[0], cost[PLAIN] = 0, 16
    total = cost[classes[:, None], sizes].sum() + 8 * (len(rows) + num_streams * _STREAM_BYTES)
    return float(total) / rows.size
