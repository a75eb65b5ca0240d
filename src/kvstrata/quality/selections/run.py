"""The whole measurement: contexts outside, codecs and methods inside, each at every budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvstrata import __version__
from kvstrata.codecs import Codec
from kvstrata.errors import KVStrataError, LayoutMismatch, UsageError
from kvstrata.identity import weights_identity
from kvstrata.quality import tasks
from kvstrata.quality.metrics import estimate
from kvstrata.quality.models import Model
from kvstrata.quality.run import everything, machine
from kvstrata.quality.selections.table import CODEC, METHOD, PRESS, Row, Table
from kvstrata.quality.selections.window import CONTINUATION, FACTS, Answered, Window, check_length
from kvstrata.quality.table import Estimate
from kvstrata.selection.evidence import Context
from kvstrata.selection.kept import Kept
from kvstrata.selection.methods import METHODS, method_named
from kvstrata.selection.presses import PREFIX, Presses
from kvstrata.selection.profiles import retrieval_profile
from kvstrata.selection.select import of_context, rows_of

LENGTH = 2048
WINDOWS = 3
FRACTIONS = (0.5, 0.25, 0.125)
PRESSES = ("ExpectedAttention", "Compactor", "CriticalAdaKV(SnapKV)", "KVzip")
"""Of kvpress, measured beside ours where its environment is."""


@dataclass
class _Asked:
    """What is gathered of one row."""

    kind: str
    identity: str
    fraction: float
    answers: list[Answered] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def codecs(model: str) -> dict[str, Codec]:
    """The codecs that selections are compared with: all lossy ones that a tier may use.

    Args:
        model: its name, as `kvstrata calibrate` put it down.
    """
    known = everything(model)
    return {
        name: codec
        for name, codec in known.items()
        if not codec.lossless and not name.startswith("kivi")
    }


def measure(
    folder: Path,
    name: str,
    text: str,
    *,
    methods: Sequence[str] | None = None,
    kvpress: Path | None = None,
    length: int = LENGTH,
    count: int = WINDOWS,
    fractions: Sequence[float] = FRACTIONS,
    weights_cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Table:
    """Measure every method, and the codecs beside them, on a model.

    Args:
        folder: of the model, in the Hugging Face form.
        name: of the model, for people.
        text: real prose; nothing may have been calibrated on it.
        methods: of ours, by name; None takes all.
        kvpress: an environment with kvpress; None leaves `PRESSES` out.
        length: tokens of a context, a whole number of chunks.
        count: disjoint windows of the text, a context each.
        fractions: of the rows, to keep.
        weights_cache: where hashes of weights are remembered.
        tell: hears what goes on.
    Raises:
        UsageError: the model cannot be measured, or is too short.
    """
    if not check_length(length):
        raise UsageError(f"a context of {length} tokens: a whole number of chunks")
    weights = weights_identity(folder, weights_cache)
    model = Model(folder)
    tokens = length + CONTINUATION + 1
    # Reading a context once more needs as many positions again.
    if 2 * length > model.max_tokens or tokens > model.max_tokens:
        raise UsageError(f"{name} takes {model.max_tokens} tokens, not {max(tokens, 2 * length)}")
    asked: dict[str, _Asked] = {}
    left_out: dict[str, str] = {}
    losses, found = [], []
    with ExitStack() as stack:
        selectors = _selectors(model, methods, folder, kvpress, stack)
        for seed, piece in enumerate(tasks.windows(model.tokenizer, text, tokens, count)):
            began = time.monotonic()
            window = Window(model, piece, length, seed)
            tell(f"window {seed + 1} of {count}: exact in {time.monotonic() - began:.0f} s")
            losses.append(window.exact_loss())
            found.append(float(np.mean(window.exact_found())))
            began = time.monotonic()
            _codecs(window, codecs(name), asked, left_out)
            tell(f"  codecs: {time.monotonic() - began:.0f} s")
            for selector in selectors:
                selector.begin(window)
            for method, selector in _by_name(selectors, left_out):
                began = time.monotonic()
                try:
                    for fraction in fractions:
                        _selected(window, method, selector, fraction, asked)
                except KVStrataError as error:
                    left_out[method] = str(error)
                tell(f"  {method}: {time.monotonic() - began:.1f} s")
    whole = {label: one for label, one in asked.items() if len(one.answers) == count}
    return Table(
        kvstrata=__version__,
        model=name,
        weights=weights,
        windows=count,
        length=length,
        questions=FACTS + len(tasks.RULES),
        machine=machine(),
        exact_perplexity=float(np.exp(np.mean(losses))),
        exact_retrieval=float(np.mean(found)),
        rows=tuple(_row(label, one) for label, one in whole.items()),
        left_out=left_out,
    )


class _Ours:
    """Methods of our own; what they take is this process's own time, however busy the machine."""

    kind = METHOD
    clock = staticmethod(time.process_time)

    def __init__(self, model: Model, methods: Sequence[str] | None) -> None:
        self._model = model
        self.names: Mapping[str, str] = {
            name: method_named(name).identity() for name in methods or METHODS
        }
        self._profile = retrieval_profile(model.causal)

    def begin(self, window: Window) -> None:
        """Take the context that is selected from next."""
        self.context = Context(
            self._model.causal,
            self._model.layers(window.kv),
            window.tokens,
            profile=self._profile,
        )

    def select(self, name: str, fraction: float) -> Kept:
        """See `kvstrata.selection.select.select`."""
        return of_context(self.context, name, rows_of(self.context, fraction=fraction))


class _Theirs:
    """Presses of kvpress, in a process of its own, whose time is that on the wall."""

    kind = PRESS
    clock = staticmethod(time.monotonic)

    def __init__(self, presses: Presses, ours: _Ours) -> None:
        self._presses = presses
        self._ours = ours
        self.names: Mapping[str, str] = {f"{PREFIX}{name}": f"kvpress {name}" for name in PRESSES}

    def begin(self, window: Window) -> None:
        """The context is the one that ours have."""

    def select(self, name: str, fraction: float) -> Kept:
        """See `kvstrata.selection.presses.Presses.select`."""
        return self._presses.select(self._ours.context, name.removeprefix(PREFIX), fraction)


def _selectors(
    model: Model,
    methods: Sequence[str] | None,
    folder: Path,
    environment: Path | None,
    stack: ExitStack,
) -> list[_Ours | _Theirs]:
    ours = _Ours(model, methods)
    if environment is None:
        return [ours]
    return [ours, _Theirs(stack.enter_context(Presses(folder, environment)), ours)]


def _by_name(
    selectors: Sequence[_Ours | _Theirs], left_out: Mapping[str, str]
) -> list[tuple[str, _Ours | _Theirs]]:
    return [
        (name, selector)
        for selector in selectors
        for name in selector.names
        if name not in left_out
    ]


def _codecs(
    window: Window,
    chosen: Mapping[str, Codec],
    asked: dict[str, _Asked],
    left_out: dict[str, str],
) -> None:
    for name, codec in chosen.items():
        if name in left_out:
            continue
        try:
            answered = window.coded(codec)
        except LayoutMismatch as error:
            left_out[name] = str(error)
            continue
        one = asked.setdefault(name, _Asked(CODEC, codec.parameters().hex(), 1.0))
        one.answers.append(answered)
        one.seconds.append(0.0)


def _selected(
    window: Window, name: str, selector: _Ours | _Theirs, fraction: float, asked: dict[str, _Asked]
) -> None:
    began = selector.clock()
    kept = selector.select(name, fraction)
    seconds = selector.clock() - began
    label = f"{name} {fraction:g}"
    one = asked.setdefault(label, _Asked(selector.kind, selector.names[name], fraction))
    one.answers.append(window.selected(kept))
    one.seconds.append(seconds)


def _row(label: str, one: _Asked) -> Row:
    answers = one.answers
    facts = [(sum(a.found), sum(a.exact_found)) for a in answers]

    def of(value: Callable[[Answered], float]) -> Estimate:
        return estimate([value(answer) for answer in answers], _mean)

    return Row(
        name=label if one.kind == CODEC else label.rpartition(" ")[0],
        kind=one.kind,
        identity=one.identity,
        fraction=one.fraction,
        bits=_mean([answer.bits for answer in answers]),
        seconds=max(one.seconds),
        perplexity=estimate(
            [answer.loss for answer in answers], lambda drawn: float(np.expm1(np.mean(drawn)))
        ),
        kl=of(lambda a: a.kl),
        questions=of(lambda a: _mean(a.questions)),
        worst=of(lambda a: max(a.questions)),
        agreement=of(lambda a: a.agreement),
        retrieval=estimate(
            facts, lambda drawn: sum(f for f, _ in drawn) / max(1, sum(e for _, e in drawn))
        )
        if any(exact for _, exact in facts)
        else None,
        rules=of(lambda a: _mean(a.rules)),
        rules_by_place=tuple(
            _mean([answer.rules[place] for answer in answers])
            for place in range(len(answers[0].rules))
        ),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
