"""The table as people read it: cells of text, and the Markdown of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstrata.quality.table import Estimate, Measured, Table, frontier


def spread(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    """A figure and its interval, unless that is the figure."""
    if estimate is None:
        return "-"
    if estimate.low == estimate.high:
        return show(estimate.value)
    return f"{show(estimate.value)} [{show(estimate.low)}, {show(estimate.high)}]"


def percent(value: float) -> str:
    """A share, with one digit."""
    return f"{100 * value:.1f}%"


def small(value: float) -> str:
    """Two digits, however small."""
    return f"{value:.2g}" if value else "0"


HEADINGS = (
    "codec", "bits", "ratio", "error K / V", "perplexity", "KL mean", "KL p99", "same token",
    "retrieval", "rules", "rules, nats", "GB/s enc / dec",
)  # fmt: skip


def cells(measured: Measured, length: int = 0) -> tuple[str, ...]:
    """One row, under `HEADINGS`."""
    scores = measured.at(length)
    return (
        measured.name,
        f"{scores.bits:.2f}",
        f"{scores.ratio:.2f}",
        f"{small(scores.key_error)} / {small(scores.value_error)}",
        spread(scores.perplexity, lambda value: f"{100 * value:+.2f}%"),
        spread(scores.kl_mean, small),
        small(scores.kl_p99.value),
        spread(scores.agreement, percent),
        spread(scores.retrieval, percent),
        spread(scores.rules, percent),
        small(scores.rules_nats.value),
        f"{measured.encode_gbps:.2f} / {measured.decode_gbps:.2f}",
    )


def markdown(table: Table) -> str:
    """The whole table for the page of documentation."""
    exact = "; ".join(
        f"{row.length} tokens: perplexity {row.perplexity:.2f}, facts found by depth "
        f"{' '.join(map(percent, row.retrieval))}, tokens of rules {percent(row.rules)}"
        for row in table.exact
    )
    lines = [
        f"{table.model} (weights {table.weights[:16]}), KVStrata {table.kvstrata}, "
        f"windows: {table.windows}, {table.machine}.",
        "",
        f"The exact cache: {exact}.",
    ]
    for length in (0, *table.lengths):
        where = f"{length} tokens of context" if length else "All lengths together"
        lines += ["", f"**{where}** (`*`: on the frontier of bits and KL)", ""]
        best = frontier(table.codecs, length)
        lines += [line(HEADINGS), line(["---"] * len(HEADINGS))]
        for measured in table.codecs:
            name, *rest = cells(measured, length)
            lines.append(line([f"`{name}`{' *' if name in best else ''}", *rest]))
    lines += ["", "**Rules by their place** (share of equal tokens, first rule to last)", ""]
    places = len(table.codecs[0].at().rules_by_place) if table.codecs else 0
    heads = ["codec", *map(str, range(1, places + 1))]
    lines += [line(heads), line(["---"] * len(heads))]
    for measured in table.codecs:
        shares = map(percent, measured.at().rules_by_place)
        lines.append(line([f"`{measured.name}`", *shares]))
    if table.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- `{name}`: {why}" for name, why in table.left_out.items()]
    return "\n".join(lines) + "\n"


def line(texts: Iterable[str]) -> str:
    """A row of a table of Markdown."""
    return f"| {' | '.join(texts)} |"
