"""Methods of the literature, each a row that composes a score, a budget and an aggregation.

All of them see the context alone, before any question (most papers let the question end the window
that they observe). Rows behind a paper's name say where they differ from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstrata.errors import UsageError
from kvstrata.selection.aggregation import Aggregation
from kvstrata.selection.budgets import (
    Budget,
    ByLayer,
    ByProfile,
    Even,
    FromTable,
    FullHeads,
    Pyramid,
    Ranked,
)
from kvstrata.selection.evidence import Again, Ahead, Lookahead, Whole, Window
from kvstrata.selection.merging import IntoNearest, Merging
from kvstrata.selection.scores import (
    Attention,
    AttentionAndDistance,
    AttentionTimesValue,
    Chance,
    KeyDistance,
    KeyNorm,
    Recency,
    Score,
)

VERSION = 1
"""Of what the parts compute; a change of any result of theirs is another version."""


_EVEN = Even()
_EACH = Aggregation()


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        name: as a user writes it.
        title: as its authors do.
        paper: arXiv's number; empty for a baseline.
        score, budget, aggregation, merging: its parts; without merging what is dropped is gone.
        sinks, recent: first and last tokens that are kept in any case.
        differs: from the paper, in words.
    """

    name: str
    title: str
    paper: str
    score: Score
    budget: Budget = _EVEN
    aggregation: Aggregation = _EACH
    merging: Merging | None = None
    sinks: int = 0
    recent: int = 0
    differs: str = ""

    def identity(self) -> str:
        """Everything that decides what is kept, but the budget's size: for a namespace."""
        parts = (self.score, self.budget, self.aggregation, self.merging, self.sinks, self.recent)
        return f"{self.name} v{VERSION} {' '.join(map(repr, parts))} context only"


_WINDOW = Attention(Window(32))
_POOLED = Aggregation(pool=7)
_QUESTION = "the window is the context's end, not a question"

_ROWS = (
    Method(
        "random", "Random", "", Chance(),
        differs="the baseline that says what choosing is worth: each head its own tokens",
    ),
    Method(
        "streaming", "StreamingLLM", "2309.17453", Recency(), sinks=4,
        differs="positions stay what they were, since a question follows at the context's end",
    ),
    Method(
        "knorm", "L2 norm", "2406.11430", KeyNorm(),
        differs="no layer is skipped (the paper leaves the first two whole)",
    ),
    Method(
        "keydiff", "KeyDiff", "2504.15364", KeyDistance(),
        differs="the context at once, not block by block",
    ),
    Method(
        "h2o", "H2O", "2306.14048", Attention(Whole()), recent=64,
        differs="after the whole context, not token by token; 64 recent ones, not half the budget",
    ),
    Method(
        "tova", "TOVA", "2401.06104", Attention(Window(1)), aggregation=Aggregation(heads="layer"),
        differs="once, after the context, not at each token",
    ),
    Method(
        "snapkv", "SnapKV", "2404.14469", _WINDOW, aggregation=_POOLED, recent=32,
        differs=f"{_QUESTION}; query heads of a group are averaged",
    ),
    Method(
        "vatp", "VATP", "2406.12335", AttentionTimesValue(Window(32)), aggregation=_POOLED,
        recent=32, differs=f"{_QUESTION}; norms of two, not of one",
    ),
    Method(
        "pyramidkv", "PyramidKV", "2406.02069", _WINDOW, Pyramid(), _POOLED, recent=32,
        differs=_QUESTION,
    ),
    Method(
        "adakv", "Ada-KV", "2407.11550", _WINDOW, Ranked(), _POOLED, recent=32,
        differs=f"{_QUESTION}; on SnapKV's scores",
    ),
    Method(
        "kvzip", "KVzip", "2505.23416", Attention(Again()),
        Ranked(across="model", safeguard=0.0), Aggregation(queries="max", groups="max"), sinks=4,
        differs="the context is read again without an instruction to repeat it, 256 tokens at a "
        "time (the paper: 2,048)",
    ),
    Method(
        "kvcompose", "KVCompose", "2509.05165", Attention(Again()),
        Ranked(across="model", aligned=True, safeguard=0.0), Aggregation(queries="max"), sinks=4,
        differs="attention of the context read again; rows stay their heads' own, since no uniform "
        "tensor is needed",
    ),
    Method(
        "cake", "CAKE", "2503.12491", _WINDOW, ByLayer("preference"),
        Aggregation(queries="shifting", pool=7), recent=32,
        differs=f"{_QUESTION}; budgets at once, not in a cascade, which saves memory in prefill "
        "and ends in the same; its constants, found on other models, are taken as they are",
    ),
    Method(
        "dynamickv", "DynamicKV", "2412.14838", _WINDOW, Ranked(across="model", unit="layer"),
        _POOLED, recent=32,
        differs=f"{_QUESTION}; layers are ranked at once, not every few layers; no cap of a layer "
        "but its tokens",
    ),
    Method(
        "zigzagkv", "ZigZagKV", "2412.09036", _WINDOW, ByLayer("coverage"), _POOLED, recent=32,
        differs=f"{_QUESTION}; uncertainty of attention alone, not of hidden states",
    ),
    Method(
        "headkv", "HeadKV", "2410.19258", _WINDOW, ByProfile(), _POOLED, recent=32,
        differs=f"{_QUESTION}; heads are profiled by copying random tokens, not by needles and "
        "reasoning",
    ),
    Method(
        "razor", "RazorAttention", "2407.15891", Recency(), FullHeads(), sinks=4,
        differs="the budget is given, so it decides how many heads are whole; no compensation "
        "token, which would need a weight in attention; induction heads alone, no echo heads",
    ),
    Method(
        "taskkv", "Task-KV", "2501.15113", _WINDOW, FullHeads("heterogeneity"), _POOLED, sinks=4,
        recent=32,
        differs="written after its abstract; distances before the output projection; the budget "
        "decides how many heads are whole; middle activations are those with the highest score",
    ),
    Method(
        "laq", "Lookahead Q-Cache", "2505.20334", Attention(Lookahead(8)), aggregation=_POOLED,
        recent=32,
        differs="pseudo queries are generated on the whole cache, which is there, not on a "
        "compressed one; they are the only ones, without the window; no question before them",
    ),
    Method(
        "dapq", "DapQ", "2603.11564", Attention(Ahead(32)), aggregation=_POOLED, recent=32,
        differs="written after its abstract; the pseudo tokens are the context's last ones again",
    ),
    Method(
        "keyformer", "Keyformer", "2403.09054", Attention(Whole(noise=True)), recent=64,
        differs="after the whole context, not token by token: the temperature rises over the "
        "context, from 1 to 2",
    ),
    Method(
        "compresskv", "CompressKV", "2508.02401", _WINDOW, ByLayer("loss"),
        Aggregation(heads="retrieval", pool=7), recent=32,
        differs=f"{_QUESTION}; retrieval heads by copying random tokens, not by semantic needles; "
        "the layers' errors are measured on the context itself, not before",
    ),
    Method(
        "defensivekv", "DefensiveKV", "2510.13334", AttentionTimesValue(Window(32)), Ranked(),
        Aggregation(queries="defensive", groups="max", pool=7), recent=32,
        differs=f"written after its abstract: the worst case over the window, never below a prior; "
        f"{_QUESTION}; the prior is ours, and values are not projected",
    ),
    Method(
        "layerdefensivekv", "Layer-DefensiveKV", "2510.13334", AttentionTimesValue(Window(32)),
        Ranked(across="model"), Aggregation(queries="defensive", groups="max", pool=7), recent=32,
        differs="as DefensiveKV; heads of all layers are ranked together",
    ),
    Method(
        "worstcase", "Worst case over windows", "", Attention(Whole()),
        Ranked(across="model"), Aggregation(queries="max", groups="max", pool=7), recent=32,
        differs="ours: no paper's. The highest mean attention that any window of the context paid, "
        "budgets as KVzip's",
    ),
    Method(
        "sagekv", "SAGE-KV", "2503.08879", Attention(Window(1)), sinks=4, recent=32,
        differs="the last token is the context's, not the question's; sinks and recent tokens are "
        "fewer than the paper's quarter of the budget each",
    ),
    Method(
        "windowkv", "WindowKV", "2503.17922", _WINDOW, Pyramid(),
        Aggregation(heads="layer", runs=8, layers=4), recent=32,
        differs=f"{_QUESTION}; no classifier of tasks: runs as for finding facts",
    ),
    Method(
        "chunkkv", "ChunkKV", "2502.00299", _WINDOW,
        aggregation=Aggregation(heads="layer", runs=10, layers=2), recent=32, differs=_QUESTION,
    ),
    Method(
        "d2o", "D2O", "2406.13035", Attention(Whole()), ByLayer("evenness"),
        merging=IntoNearest(), sinks=4, recent=64,
        differs="once, after the context, so the threshold of similarity is a mean and no moving "
        "one; layers by how evenly the window's attention is spread",
    ),
    Method(
        "vlcache", "VL-Cache", "2410.23317", _WINDOW, ByLayer("density"), recent=32,
        differs="for images in its paper: the window behind them is here the context's end; all "
        "tokens are text",
    ),
    Method(
        "meda", "MEDA", "2502.17599", _WINDOW, ByLayer("entropy"), merging=IntoNearest(False),
        recent=32,
        differs="for images in its paper: entropy of all attention, since there is one modality",
    ),
    Method(
        "mixkv", "MixKV", "2510.20707", AttentionAndDistance(Window(32)), recent=32,
        differs="on SnapKV's scores without pooling; importance and diversity are scaled to the "
        "same range, the values' norms do not count",
    ),
    Method(
        "evolkv", "EvolKV", "2509.08315", _WINDOW, FromTable(), _POOLED, recent=32,
        differs=f"{_QUESTION}; the table of the layers' shares is given: no search is run here",
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
"""Every method by its name."""

NOT_COMPOSED: Mapping[str, str] = {
    "EpiCache": "one cache for each episode of a conversation, not one for a context",
    "FastKV, PyramidInfer, Batch-Max": "drop tokens while the context is computed, so that the "
    "exact cache, which is what there is to select from, never exists",
    "DBudgetKV": "no budget: it stops where an attention metric says so",
    "KeepKV": "votes of merged tokens enter attention, which a row of a key and a value has no "
    "place for",
    "KVMerger": "what is merged decides how much is kept, not a budget",
    "SpindleKV": "a learned codebook stands for tokens of shallow layers",
    "FastGen": "each head another rule, with as many tokens as the rule needs",
    "KV-Compress": "whole blocks of an engine's memory; what it ranks is Ada-KV's across layers",
    "R-KV": "drops what a reasoning model generates, while it does",
    "LOOK-M, PureKV, GUI-KV, StreamMem, StreamKV, Elastic Cache": "rules about images, or what a "
    "context of text does not have; LOOK-M's merging is in `meda`",
    "CriticalKV, ExpectedAttention, LagKV, Compactor, CUR": "composed by kvpress: `kvpress:NAME`",
}
"""Methods of the literature that no row composes, and why."""


def method_named(name: str) -> Method:
    """A row.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in METHODS:
        raise UsageError(f"no method {name!r} of selection; there are {', '.join(METHODS)}")
    return METHODS[name]
