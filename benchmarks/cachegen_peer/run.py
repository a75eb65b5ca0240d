"""LMCache's own CacheGen beside ours: the divergence that each pays for its bits."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, expect, main, say

from kvstrata.codecs import CODECS
from kvstrata.errors import UsageError
from kvstrata.layout import Elements
from kvstrata.quality import run as quality
from kvstrata.quality import tasks
from kvstrata.quality.coding import by_chunk
from kvstrata.quality.models import Model
from kvstrata.quality.samples import Sample, Window
from kvstrata.quality.scores import scores
from kvstrata.quality.table import Scores
from kvstrata.testing.models import smollm2

NAME = "cachegen_peer"
RELEASE = "0.5.6"
OURS = [name for name in CODECS if name.startswith("cachegen-")]

#: Its bins, times this; 1 is what LMCache configures for this model, and no option changes it.
SCALES = (1.0, 0.5, 2.0)
#: Its option ``chunk_size``: the default, and one that pays for fewer tables.
CHUNK_TOKENS, LONG_CHUNK_TOKENS = 256, 1024


class Peer:
    """LMCache's serializer and deserializer as released, on the device that it chooses.

    Args:
        folder: of the model; LMCache reads from it how many layers there are.
        scale: of the bins that LMCache then chooses.
    Raises:
        UsageError: LMCache is not installed, or is another release.
    """

    def __init__(self, folder: Path, scale: float) -> None:
        os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
        self._torch: Any = importlib.import_module("torch")
        try:
            release = importlib.metadata.version("lmcache")
            modules: list[Any] = [
                importlib.import_module(f"lmcache.storage_backend.serde.cachegen_{part}")
                for part in ("encoder", "decoder")
            ]
        except ImportError as error:
            command = f"pip install --no-deps lmcache=={RELEASE}"
            raise UsageError(f"LMCache's CacheGen is not here ({error}): {command}") from error
        if release != RELEASE:
            raise UsageError(f"LMCache {release}, not {RELEASE}")
        self._encoder, self._decoder = modules
        config = SimpleNamespace(chunk_size=LONG_CHUNK_TOKENS)
        metadata = SimpleNamespace(model_name=str(folder))
        self._to = self._encoder.CacheGenSerializer(config, metadata)
        self._from = self._decoder.CacheGenDeserializer(config, metadata, self._torch.bfloat16)
        for side in (self._to, self._from):
            side.key_bins, side.value_bins = side.key_bins * scale, side.value_bins * scale
        bins = sorted({int(number) for number in (*self._to.key_bins, *self._to.value_bins)})
        self.bins = " and ".join(map(str, reversed(bins)))
        self._most_bins = bins[-1]

    def table_bits(self, chunk_tokens: int) -> float:
        """Bits of an element that are tables of frequencies: 16-bit numbers, one more than bins,
        for every channel of every layer of a chunk."""
        return 16 * (self._most_bins + 1) / chunk_tokens

    def encode(self, words: Elements) -> bytes:
        """What LMCache would store of a chunk (L, 2, H, T, D), words of bfloat16."""
        encoded: bytes = self._to.to_bytes(self._tensor(words))
        return encoded

    def code(self, words: Elements, start: int) -> tuple[int, Elements]:
        """Encode and decode, for `by_chunk`."""
        encoded = self.encode(words)
        # [L, 2, T, H, D], and torch has bfloat16 where numpy has words.
        decoded = self._from.from_bytes(encoded).permute(0, 1, 3, 2, 4).cpu().contiguous()
        back: Elements = decoded.view(self._torch.int16).numpy().view(np.uint16)
        return len(encoded), back

    def check(self, words: Elements) -> None:
        """Its entropy coder must give back every symbol: then only quantising is lossy."""
        tensor = self._tensor(words)
        layers, _, tokens, heads, dim = tensor.shape
        expected = []
        for state, bins in enumerate((self._to.key_bins, self._to.value_bins)):
            numbers = tensor[:, state].reshape(layers, tokens, heads * dim)
            symbols, largest = self._encoder.torch_quant_vectorized(bins, numbers)
            expected.append(self._decoder.do_dequantize(symbols.float(), bins, largest))
        whole = self._torch.stack(expected, 1).to(self._torch.bfloat16)
        found = self._from.from_bytes(self.encode(words))
        expect(bool((found.view_as(whole) == whole).all()), "its coder lost symbols")

    def _tensor(self, words: Elements) -> Any:
        tensor = self._torch.from_numpy(words.view(np.int16)).view(self._torch.bfloat16)
        return tensor.permute(0, 1, 3, 2, 4).contiguous().to(self._to.key_bins.device)


@dataclass
class Case:
    """One method over all windows: what it is called, its samples, and its bits in tables."""

    name: str
    windows: list[list[Sample]]
    table_bits: float = 0.0


def sample_peer(peer: Peer, window: Window) -> tuple[list[Sample], list[Sample]]:
    """A window through LMCache: in chunks of its default size, and in longer ones.

    It quantises token by token, so that chunks of another size decode to the same numbers.
    """
    peer.check(np.ascontiguousarray(window.prose[:, :, :, :CHUNK_TOKENS]))
    prose = by_chunk(peer.code, window.prose, CHUNK_TOKENS)
    samples = window.compare(prose, by_chunk(peer.code, window.asked, CHUNK_TOKENS))
    starts = range(0, window.prose.shape[3], LONG_CHUNK_TOKENS)
    chunks = [window.prose[:, :, :, start : start + LONG_CHUNK_TOKENS] for start in starts]
    sizes = [len(peer.encode(np.ascontiguousarray(words))) for words in chunks]
    long = replace(prose, nbytes=np.array(sizes), chunk_tokens=LONG_CHUNK_TOKENS)
    return samples, [replace(sample, bits=long.bits(sample.length)) for sample in samples]


def measure(options: Options) -> list[Row]:
    """Both on the windows of ``kvstrata quality``: the same model, KV, questions and figures."""
    folder = smollm2()
    peers = [Peer(folder, scale) for scale in SCALES]
    model = Model(folder)
    lengths, count = (1024,) if options.quick else quality.LENGTHS, quality.WINDOWS
    tokens = max(lengths) + tasks.CONTINUATION + 1
    pieces = tasks.windows(model.tokenizer, quality.held_out_text(), tokens, count)
    ours = [Case(name, []) for name in OURS]
    deep = {name: codec for name, codec in quality.everything(folder.name).items() if "@" in name}
    others = [Case(name, []) for name in deep]
    theirs = [
        Case(f"LMCache, {peer.bins} bins, chunks of {size}", [], peer.table_bits(size))
        for peer in peers
        for size in (CHUNK_TOKENS, LONG_CHUNK_TOKENS)
    ]
    for seed, piece in enumerate(pieces):
        window = Window(model, piece, lengths, options.seed + seed)
        for case in ours:
            case.windows.append(window.sample(CODECS[case.name]))
        for case in others:
            case.windows.append(window.sample(deep[case.name]))
        for i, peer in enumerate(peers):
            for case, samples in zip(theirs[2 * i :], sample_peer(peer, window), strict=False):
                case.windows.append(samples)
        say(f"window {seed + 1} of {count}")
    found = {case.name: scores(case.windows, 0) for case in (*ours, *others)}
    frontier = [found[case.name] for case in ours]
    return [
        *(
            Row(NAME, name, one.bits, None, unit="bits an element", detail=words(one))
            for name, one in found.items()
        ),
        *(
            compared(case, frontier, {case.name: found[case.name] for case in others})
            for case in theirs
        ),
    ]


def compared(case: Case, frontier: list[Scores], others: Mapping[str, Scores]) -> Row:
    """Its bits over ours at the same divergence, our levels joined by lines of log KL.

    Where they are fewer than our coarsest level's: over those of the codec among the others that
    does no more damage with the fewest.
    """
    found = scores(case.windows, 0)
    kl = [level.kl_mean.value for level in frontier]
    ours = float(np.interp(np.log(found.kl_mean.value), np.log(kl), [x.bits for x in frontier]))
    detail = f"{found.bits:.2f} bits, {case.table_bits:.2f} of them tables; {words(found)}; ours "
    if found.kl_mean.value < min(kl):
        return Row(NAME, case.name, float("nan"), None, detail=detail + "are not so exact")
    ratio = found.bits / ours
    detail += f"{ours:.2f} bits"
    if found.kl_mean.value > max(kl):
        # Our coarsest level does less damage. With more bits than that LMCache loses all the same.
        detail += f", at a KL of only {max(kl):.2g}"
        better = [name for name in others if others[name].kl_mean.value <= found.kl_mean.value]
        if ratio < 1 and better:
            name = min(better, key=lambda name: others[name].bits)
            detail += f"; {name} {others[name].bits:.2f} bits at {others[name].kl_mean.value:.2g}"
            ratio = found.bits / others[name].bits
            return Row(
                NAME, f"{case.name}: bits / {name}", ratio, 1.0, at_most=False, detail=detail
            )
        if ratio < 1:
            return Row(NAME, f"{case.name}: bits / our fewest", ratio, None, detail=detail)
    return Row(NAME, f"{case.name}: bits / ours", ratio, 1.0, at_most=False, detail=detail)


def words(found: Scores) -> str:
    """The damage in one line."""
    kl = found.kl_mean
    told = "-" if found.retrieval is None else f"{found.retrieval.value:.0%}"
    return (
        f"KL {kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}], same token {found.agreement.value:.1%}, "
        f"perplexity {found.perplexity.value:+.1%}, retrieval {told}"
    )


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
