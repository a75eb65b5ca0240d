"""What ``kvstrata demo`` found, as a table, as a picture and for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

#: how the answers are asked for, in this order
WAYS: Mapping[str, str] = {
    "cold": "cold",
    "own": "its own hit",
    "host": "host memory",
    "disk": "disk, after restart",
}


#: what goes on from what is known, in this order
CASES: Mapping[str, str] = {"turn": "the next turn of the chat", "other": "another question"}


@dataclass(frozen=True)
class Reused:
    """What was loaded of a prompt that goes on from something known.

    Args:
        common: its leading tokens that are known.
        loaded: tokens of these that were loaded.
        whole: tokens of these in whole chunks, which is what would be loaded without the rest.
    """

    common: int
    loaded: int
    whole: int


@dataclass
class Asked:
    """One document, and how each way of asking about it went.

    Args:
        number: from 1.
        prompt_tokens: of the document and its question.
        first_ms: time to the first token, by way, of each time it was asked.
        tokens: the tokens of each answer, by way.
        answer: the cold answer in words.
        reused: by case, see `CASES`.
    """

    number: int
    prompt_tokens: int
    first_ms: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    answer: str = ""
    reused: dict[str, Reused] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether all answers are equal, token by token."""
        return len({tuple(answer) for answers in self.tokens.values() for answer in answers}) == 1

    def heard(self, way: str, first_s: float, tokens: list[int]) -> None:
        """Keep an answer: seconds to its first token, and its tokens."""
        self.first_ms.setdefault(way, []).append(round(first_s * 1e3, 1))
        self.tokens.setdefault(way, []).append(tokens)

    def ms(self, way: str) -> float:
        """Time to the first token: the median of all times that it was asked this way."""
        return statistics.median(self.first_ms[way])

    def faster(self, way: str) -> float:
        """How many times sooner than cold the first token comes."""
        return self.ms("cold") / self.ms(way)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = {way: self.ms(way) for way in self.first_ms}
        return {**asdict(self), "median_ms": medians, "same": self.same}


def table(documents: Sequence[Asked], engine: str = "vLLM") -> Table:
    """The times for people, a row a document."""
    from rich.table import Table

    found = Table(title="time to the first token, ms", header_style="bold")
    for heading in (
        "document",
        "tokens",
        *(name.replace("its", f"{engine}'s") for name in WAYS.values()),
        "host is faster",
        "disk is faster",
        "same tokens",
    ):
        found.add_column(heading, justify="right")
    for asked in documents:
        found.add_row(
            str(asked.number),
            f"{asked.prompt_tokens:,}",
            *(f"{asked.ms(way):,.0f}" for way in WAYS),
            *(f"{asked.faster(way):.0f}x" for way in ("host", "disk")),
            "yes" if asked.same else "[bold red]NO[/]",
        )
    return found


def reuse_table(documents: Sequence[Asked]) -> Table:
    """How many tokens were reused, for people, a row a document."""
    from rich.table import Table

    found = Table(title="tokens reused, from disk after the restart", header_style="bold")
    found.add_column("document", justify="right")
    for case in CASES.values():
        for heading in (f"{case}: known", "reused", "by whole chunks alone"):
            found.add_column(heading, justify="right")
    for asked in documents:
        counts = [
            f"{count:,}"
            for case in CASES
            for one in [asked.reused[case]]
            for count in (one.common, one.loaded, one.whole)
        ]
        found.add_row(str(asked.number), *counts)
    return found


def plot(documents: Sequence[Asked], path: Path, caption: str, engine: str = "vLLM") -> bool:
    """Draw cold, host and disk side by side for each document; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"cold": "#9aa5b1", "host": "#0b7285", "disk": "#e8590c"}
    labels = {
        "cold": "cold: computed",
        "host": "warm from KVStrata's host memory",
        "disk": "warm from KVStrata's disk, everything restarted",
    }
    figure, axes = pyplot.subplots(figsize=(9, 4.6), dpi=160)
    width = 0.28
    for place, (way, colour) in enumerate(colours.items()):
        heights = [asked.ms(way) / 1e3 for asked in documents]
        bars = axes.bar(
            [i + (place - 1) * width for i in range(len(documents))],
            heights,
            width * 0.94,
            color=colour,
            label=labels[way],
        )
        axes.bar_label(
            bars,
            labels=[f"{h:.2f}" if h < 1 else f"{h:.1f}" for h in heights],
            padding=2,
            fontsize=7.5,
            color=colour if way != "cold" else "#52606d",
        )
    axes.set_xticks(
        range(len(documents)),
        [
            f"{asked.prompt_tokens:,} tokens\n"
            f"{asked.faster('host'):.0f}x / {asked.faster('disk'):.0f}x faster"
            for asked in documents
        ],
        fontsize=8.5,
    )
    axes.set_ylabel("seconds to the first token")
    axes.set_xlabel(caption, fontsize=8.5, color="#52606d")
    axes.set_title(
        f"{engine} with KVStrata: long documents, the same tokens each time"
        if all(asked.same for asked in documents)
        else f"{engine} with KVStrata: SOME ANSWERS DIFFER",
        loc="left",
        fontsize=12,
        fontweight="bold",
        pad=28,  # the legend lies between
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(colours),
        fontsize=8.5,
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
