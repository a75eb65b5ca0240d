"""The whole measurement: windows outside, codecs inside, so that each prefill happens once."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from kvstrata import __version__
from kvstrata.codecs import CODECS, Codec, codec_named
from kvstrata.codecs.calibration import stored
from kvstrata.codecs.kvtc import Kvtc
from kvstrata.errors import LayoutMismatch, UsageError
from kvstrata.identity import weights_identity
from kvstrata.quality import tasks
from kvstrata.quality.baselines import BASELINES
from kvstrata.quality.coding import CHUNK_TOKENS, chunk, speeds, through
from kvstrata.quality.corpus import english_text
from kvstrata.quality.merging import comparable
from kvstrata.quality.models import Model
from kvstrata.quality.samples import Sample, Window
from kvstrata.quality.scores import scores
from kvstrata.quality.table import Exact, Measured, Table

LENGTHS = (1024, 4096, 7168)
WINDOWS = 5
SPEED_TOKENS = 1024


def everything(model: str) -> dict[str, Codec]:
    """What can be measured on a model, in the order of a table: the registered codecs, those of its
    calibrations in the cache, the baselines.
    """
    # One calibrated from the hub is called org/model, and one of another name may fit all the same.
    named = [one for one in stored() if one.header.model.rpartition("/")[2] == model]
    calibrations = named or stored()
    levels = [Kvtc(int(level), one) for one in calibrations for level in one.header.steps]
    return {**CODECS, **{codec.name: codec for codec in levels}, **BASELINES}


def choose(names: Sequence[str], model: str) -> dict[str, Codec]:
    """The named codecs, and without names all there are but raw; the keys are their full names.

    Args:
        names: of codecs; of a level of the model's only calibration the short form will do: kvtc-2.
        model: its name, as `kvstrata calibrate` put it down.
    Raises:
        UsageError: there is no such codec.
    """
    known = everything(model)
    if not names:
        return {name: codec for name, codec in known.items() if name != "raw"}
    chosen = {}
    for name in names:
        ours = [full for full in known if full.startswith(f"{name}@")]
        codec = known.get(ours[0] if len(ours) == 1 else name) or codec_named(name)
        chosen[name if name in known else codec.name] = codec
    return chosen


def held_out_text() -> str:
    """Real prose that no codec was calibrated on: the second half of the text that we have."""
    text = english_text()
    return text[len(text) // 2 :]


@dataclass
class _Asked:
    """What is gathered of one codec."""

    codec: Codec
    samples: list[list[Sample]] = field(default_factory=list)
    gbps: tuple[float, float] = (0.0, 0.0)


def measure(
    folder: Path,
    name: str,
    codecs: Mapping[str, Codec],
    text: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    count: int = WINDOWS,
    weights_cache: Path | None = None,
    onto: Table | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Table:
    """Measure codecs on a model.

    Args:
        folder: of the model, in the Hugging Face form.
        name: of the model, for people.
        codecs: by name.
        text: real prose; nothing may have been calibrated on it.
        lengths: of contexts, whole numbers of chunks, ascending.
        count: disjoint windows of the text.
        weights_cache: where hashes of weights are remembered.
        onto: a table that the result shall go into: `kvstrata.quality.merging`.
        tell: hears what goes on.
    Raises:
        UsageError: the model cannot be measured, or is too short for these lengths, or the result
            will not fit ``onto``.
    """
    if not lengths or any(length % CHUNK_TOKENS for length in lengths):
        raise UsageError(f"context lengths {lengths}: whole numbers of {CHUNK_TOKENS} tokens")
    weights = weights_identity(folder, weights_cache)
    model = Model(folder)
    tokens = max(lengths) + tasks.CONTINUATION + 1
    if tokens > model.max_tokens:
        raise UsageError(f"{name} takes {model.max_tokens} tokens, not {tokens}")
    pieces = tasks.windows(model.tokenizer, text, tokens, count)
    empty = Table(
        kvstrata=__version__,
        model=name,
        weights=weights,
        text=xxhash.xxh3_128_hexdigest(np.array(pieces, "<i8").tobytes()),
        windows=count,
        lengths=tuple(lengths),
        machine=machine(),
        exact=(),
        codecs=(),
        left_out={},
    )
    if onto is not None:
        # Now, not after half an hour.
        comparable(onto, empty)
    asked = {codec_name: _Asked(codec) for codec_name, codec in codecs.items()}
    left_out: dict[str, str] = {}
    windows: list[list[_Baseline]] = []
    for seed, piece in enumerate(pieces):
        began = time.monotonic()
        window = Window(model, piece, lengths, seed)
        tell(f"window {seed + 1} of {count}: exact cache in {time.monotonic() - began:.0f} s")
        windows.append([_baseline(window, length) for length in lengths])
        for codec_name, one in list(asked.items()):
            began = time.monotonic()
            try:
                one.codec.check(chunk(window.prose, 0)[0])
            except LayoutMismatch as error:
                left_out[codec_name] = str(error)
                del asked[codec_name]
                continue
            one.samples.append(window.sample(one.codec))
            if seed == 0:
                # What came before has compiled it and warmed it.
                one.gbps = speeds(one.codec, window.prose)
            tell(f"  {codec_name}: {time.monotonic() - began:.1f} s")
    return msgspec.structs.replace(
        empty,
        exact=tuple(
            _exact([window[i] for window in windows], length) for i, length in enumerate(lengths)
        ),
        codecs=tuple(_measured(codec_name, one, lengths) for codec_name, one in asked.items()),
        left_out=left_out,
    )


def measure_speeds(
    folder: Path, table: Table, text: str, *, tell: Callable[[str], None] = lambda line: None
) -> Table:
    """A table with the speeds of this machine; all else stays.

    Args:
        folder: of the table's model, in the Hugging Face form.
        table: measured somewhere.
        text: real prose.
        tell: hears what goes on.
    Raises:
        UsageError: a codec of the table is not here, or is another one by now.
    """
    codecs: list[Codec] = []
    for row in table.codecs:
        codecs += choose([row.name], table.model).values()
        if (codecs[-1].family, codecs[-1].parameters().hex()) != (row.family, row.parameters):
            raise UsageError(f"{row.name} is not what the table measured: measure it again")
    model = Model(folder)
    kv = model.prefill(tasks.windows(model.tokenizer, text, SPEED_TOKENS, 1)[0])
    rows = []
    for row, codec in zip(table.codecs, codecs, strict=True):
        through(codec, kv[:, :, :, :CHUNK_TOKENS])  # compiles it
        encoding, decoding = speeds(codec, kv)
        tell(f"  {row.name}: {encoding:.2f} / {decoding:.2f} GB/s")
        rows.append(msgspec.structs.replace(row, encode_gbps=encoding, decode_gbps=decoding))
    return msgspec.structs.replace(table, machine=machine(), codecs=tuple(rows))


@dataclass(frozen=True)
class _Baseline:
    loss: float
    found: list[bool]
    rules: list[float]


def _baseline(window: Window, length: int) -> _Baseline:
    return _Baseline(
        window.exact_loss(length), window.exact_found(length), window.exact_rules(length)
    )


def _exact(rows: Sequence[_Baseline], length: int) -> Exact:
    return Exact(
        length=length,
        perplexity=float(np.exp(np.mean([row.loss for row in rows]))),
        retrieval=tuple(float(share) for share in np.mean([row.found for row in rows], axis=0)),
        rules=float(np.mean([row.rules for row in rows])),
    )


def _measured(name: str, one: _Asked, lengths: Sequence[int]) -> Measured:
    return Measured(
        name=name,
        family=one.codec.family,
        parameters=one.codec.parameters().hex(),
        lossless=one.codec.lossless,
        encode_gbps=one.gbps[0],
        decode_gbps=one.gbps[1],
        scores=tuple(scores(one.samples, length) for length in (0, *lengths)),
    )


def machine() -> str:
    """Words for what the speeds were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{cpu}, {os.cpu_count()} cores"
