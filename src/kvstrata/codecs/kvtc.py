"""Transform coding: components of keys and values that a calibration found, quantised, packed.

Keys are turned back to position 0, where they vary least. The components of a group of heads are
those of `kvstrata.codecs.calibration`: uncorrelated, and scaled so that an error of one size does
the same damage in each. So one bin width serves them all, and entropy coding gives each the bits
that its variance earns: the water-filling that the paper's dynamic programming looks for. The
prompt's first tokens, the attention sinks, stay exact.

A frame::

    0 | exact tokens [S, H, n, D] as they were | class of each component, S * H * D | rANS stream
    1 | all tokens [S, H, T, D] as they were

The second where the artefact does not fit the numbers. A row of the stream is a component over the
tokens, a block a group of heads; `kvstrata.codecs.entropy` is its page.

Decoded numbers may differ between machines in their last bits, as matrix products do.

Source: KV Cache Transform Coding, arXiv:2511.01815; differs: components weighted by the damage
that errors do, by layer, on their own; rANS with models by component, not DEFLATE; no window of
recent tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from kvstrata.codecs import calibration as artefacts
from kvstrata.codecs import entropy, rope
from kvstrata.codecs.base import Payload, corrupt
from kvstrata.codecs.calibration import FINGERPRINT_BYTES, Calibration
from kvstrata.codecs.elements import Floats
from kvstrata.codecs.entropy import Symbols
from kvstrata.codecs.lossy import LossyCodec
from kvstrata.codecs.packing import LARGEST
from kvstrata.codecs.sinks import exact_bytes, load_exact, num_exact, store_exact
from kvstrata.errors import Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import Bytes

VERSION = 2
NUM_SINKS = 4

_CODED, _EXACT = 0, 1
_LARGEST_SYMBOL = 32000.0


@dataclass(frozen=True)
class Kvtc(LossyCodec):
    """Components of one calibrated model.

    Args:
        level: of the calibration; half bits per element, on the text it was calibrated with.
        calibration: of the model.
    Raises:
        UsageError: the calibration has no such level.
    """

    level: int
    calibration: Calibration

    family = "kvtc"
    positional = True  # keys are turned back, each by where it stands

    def __post_init__(self) -> None:
        if str(self.level) not in self.calibration.header.steps:
            raise UsageError(
                f"kvtc-{self.level / 2:g}: this calibration has "
                + ", ".join(f"kvtc-{level / 2:g}" for level in self.calibration.header.levels)
            )

    @property
    def name(self) -> str:
        return f"kvtc-{self.level / 2:g}@{self.calibration.fingerprint.hex()[:8]}"

    def parameters(self) -> bytes:
        return bytes([VERSION, self.level]) + self.calibration.fingerprint

    @classmethod
    def from_parameters(cls, parameters: bytes) -> Kvtc:
        if len(parameters) != 2 + FINGERPRINT_BYTES or parameters[0] != VERSION:
            raise Incompatible(f"kvtc {parameters.hex() or 'of no version'}, not version {VERSION}")
        try:
            return cls(parameters[1], artefacts.find(parameters[2:]))
        except UsageError as error:
            raise Incompatible(str(error)) from error

    def check(self, payload: Payload) -> None:
        super().check(payload)
        header = self.calibration.header
        layers, states, heads, _, dim = payload.shape
        if (layers, states, heads, dim) != (header.layers, 2, header.heads, header.dim):
            raise LayoutMismatch(
                f"{layers} layers with {states} states of {heads} heads of {dim} channels; the "
                f"calibration of {header.model} is of {header.layers} layers with 2 states of "
                f"{header.heads} heads of {header.dim}"
            )

    def numbers_bound(self, payload: Payload) -> int:
        num_rows = payload.layer_elements // payload.shape[3]
        exact = exact_bytes(num_exact(NUM_SINKS, payload), payload)
        coded = exact + num_rows + entropy.bound(num_rows, payload.shape[3])
        return 1 + max(coded, exact_bytes(payload.shape[3], payload))

    def encode_numbers(self, numbers: Floats, layer: int, payload: Payload, out: Bytes) -> int:
        states, _, count, _ = numbers.shape
        exact = num_exact(NUM_SINKS, payload)
        symbols = self._symbols(count - exact)
        noise = power = 0.0
        for state in range(states):
            coefficients, signal = self._analysed(numbers[state], exact, layer, state, payload)
            noise += _quantise(coefficients, symbols[state])
            power += signal
        # Noise as large as the numbers: zeros would be as good. Also where anything overflowed.
        if not noise < power and symbols.size:
            out[0] = _EXACT
            return 1 + store_exact(numbers, count, payload, out[1:])
        out[0] = _CODED
        end = 1 + store_exact(numbers, exact, payload, out[1:])
        blocks = _blocks(symbols)
        classes = entropy.classify(blocks)
        out[end : end + len(classes)] = classes
        end += len(classes)
        return end + entropy.encode([(blocks, classes)], out[end:])

    def decode_numbers(self, frame: Bytes, layer: int, payload: Payload, out: Floats) -> None:
        states, heads, count, dim = out.shape
        coded = len(frame) > 0 and frame[0] == _CODED
        exact = num_exact(NUM_SINKS, payload) if coded else count
        begin = 1 + exact_bytes(exact, payload)
        end = begin + states * heads * dim if coded else begin
        if len(frame) < end or frame[0] > _EXACT or (not coded and len(frame) != end):
            raise corrupt("kvtc: not as long as it says")
        load_exact(frame[1:], exact, payload, out)
        if not np.isfinite(out[:, :, :exact]).all():
            raise corrupt("kvtc: exact tokens that are not finite")
        if coded:
            symbols, classes = self._symbols(count - exact), frame[begin:end].copy()
            entropy.decode(frame[end:], [(_blocks(symbols), classes)])
            for state, present in enumerate(classes.reshape(states, -1, symbols.shape[3]) > 0):
                self._synthesise(symbols[state], present, exact, layer, state, payload, out[state])

    def _symbols(self, count: int) -> Symbols:
        """Room for a layer of ``count`` tokens: (2, groups, count, width)."""
        _, states, groups, width, _ = self.calibration.components.shape
        return np.empty((states, groups, count, width), np.int16)

    def _analysed(
        self, heads: Floats, exact: int, layer: int, state: int, payload: Payload
    ) -> tuple[Floats, float]:
        """Coefficients (groups, T - n, W) in bins; the summed squares of what they come from."""
        numbers = self.calibration
        num_heads, count, dim = heads.shape
        angles = self._angles(exact, layer, state, payload)
        turned = np.empty((count - exact, num_heads, dim), np.float32)
        rope.unrotate(heads[:, exact:], angles.cos, angles.sin, turned)
        scale = numbers.weight[layer, state] / np.float32(self._step)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = turned.reshape(count - exact, num_heads * dim) * scale
            power = float(np.sum(scaled * scaled, dtype=np.float64))
            scaled -= numbers.mean[layer, state] * scale
            components = numbers.components[layer, state]
            groups, width, _ = components.shape
            coefficients = np.empty((groups, count - exact, width), np.float32)
            for group, rows in enumerate(components):
                part = slice(group * width, (group + 1) * width)
                np.matmul(scaled[:, part], rows.T, out=coefficients[group])
        return coefficients, power

    def _synthesise(
        self,
        symbols: Symbols,
        present: npt.NDArray[np.bool_],
        exact: int,
        layer: int,
        state: int,
        payload: Payload,
        out: Floats,
    ) -> None:
        """Numbers of tokens n to T of one state into ``out`` (H, T, D).

        ``present`` (groups, W): which components are not all zeros.
        """
        numbers = self.calibration
        num_heads, count, dim = out.shape
        tokens = np.empty((count - exact, num_heads * dim), np.float32)
        for group, rows in enumerate(numbers.components[layer, state]):
            width = len(rows)
            # The last components are mostly zeros, and cost nothing.
            used = width - int(present[group, ::-1].argmax()) if present[group].any() else 0
            levels = symbols[group, :, :used].astype(np.float32)
            part = slice(group * width, (group + 1) * width)
            np.matmul(levels, rows[:used], out=tokens[:, part])
        scale = np.float32(self._step) / numbers.weight[layer, state]
        _unscale(tokens, scale, numbers.mean[layer, state])
        angles = self._angles(exact, layer, state, payload)
        rope.rotate(
            tokens.reshape(count - exact, num_heads, dim),
            angles.cos,
            angles.sin,
            LARGEST[payload.dtype],
            out[:, exact:],
        )

    @property
    def _step(self) -> float:
        return self.calibration.header.steps[str(self.level)]

    def _angles(self, exact: int, layer: int, state: int, payload: Payload) -> rope.Angles:
        count, dim = payload.shape[3] - exact, payload.shape[4]
        if state == 1:
            return rope.still(count, dim)
        frequencies = self.calibration.layer_frequencies[layer]
        return rope.angles(frequencies, payload.start + exact, count)


def named(name: str) -> Kvtc:
    """The codec called ``kvtc-BITS`` or ``kvtc-BITS@FINGERPRINT``, of an artefact in the cache.

    Raises:
        UsageError: there is no such level or artefact, or several and none is named.
    """
    match = re.fullmatch(r"kvtc-([0-9]{1,2})(\.5)?(?:@([0-9a-f]{1,32}))?", name)
    if not match:
        raise UsageError(f"no codec {name!r}; a level of kvtc is called like kvtc-2 or kvtc-2.5")
    bits, half, wanted = match.groups("")
    found = [one for one in artefacts.stored() if one.fingerprint.hex().startswith(wanted)]
    if not found:
        raise UsageError(
            f"{name} needs a calibration of the model, and {artefacts.folder()} holds none "
            f"{'of that name' if wanted else 'yet'}: kvstrata calibrate MODEL"
        )
    if len(found) > 1:
        which = ", ".join(f"@{one.fingerprint.hex()[:8]} of {one.header.model}" for one in found)
        raise UsageError(f"{name}: say of which calibration, by its end: {which}")
    return Kvtc(2 * int(bits) + bool(half), found[0])


def _blocks(symbols: Symbols) -> Symbols:
    """Those of both states, (states, groups, T, W), as one part of a stream."""
    states, groups, count, width = symbols.shape
    return symbols.reshape(states * groups, count, width)


def _quantise(coefficients: Floats, out: Symbols) -> float:
    """Round to whole bins; the summed squared error comes back, infinite where no bin fits."""
    nearest = np.rint(coefficients)
    # A comparison that also fails for what is not a number.
    if nearest.size and not np.abs(nearest).max() <= _LARGEST_SYMBOL:
        return math.inf
    out[...] = nearest
    coefficients -= nearest
    flat = coefficients.reshape(-1)
    return float(np.dot(flat, flat))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _unscale(tokens: Floats, scale: Floats, mean: Floats) -> None:
    for token in range(len(tokens)):
        for i in range(len(scale)):
            tokens[token, i] = tokens[token, i] * scale[i] + mean[i]
