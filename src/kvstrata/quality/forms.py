"""The table as people read it: cells of text, and the Markdown of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstrata.quality.table import Estimate, Measured, Table, frontier


def _spread(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    if estimate is None:
        return "-"
    if estimate.low == estimate.high:
        return show(estimate.value)
    return f"{show(estimate.value)} [{show(estimate.low)}, {show(estimate.high)}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _small(value: float) -> str:
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
        f"{_small(scores.key_error)} / {_small(scores.value_error)}",
        _spread(scores.perplexity, lambda value: f"{100 * value:+.2f}%"),
        _spread(scores.kl_mean, _small),
        _small(scores.kl_p99.value),
        _spread(scores.agreement, _percent),
        _spread(scores.retrieval, _percent),
        _spread(scores.rules, _percent),
        _small(scores.rules_nats.value),
        f"{measured.encode_gbps:.2f} / {measured.decode_gbps:.2f}",
    )


def markdown(table: Table) -> str:
    """The whole table for the page of documentation."""
    exact = "; ".join(
        f"{row.length} tokens: perplexity {row.perplexity:.2f}, facts found by depth "
        f"{' '.join(map(_percent, row.retrieval))}, tokens of rules {_percent(row.rules)}"
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
        lines += [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
        for measured in table.codecs:
            name, *rest = cells(measured, length)
            lines.append(_line([f"`{name}`{' *' if name in best else ''}", *rest]))
    lines += ["", "**Rules by their place** (share of equal tokens, first rule to last)", ""]
    places = len(table.codecs[0].at().rules_by_place) if table.codecs else 0
    heads = ["codec", *map(str, range(1, places + 1))]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for measured in table.codecs:
        shares = map(_percent, measured.at().rules_by_place)
        lines.append(_line([f"`{measured.name}`", *shares]))
    if table.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- `{name}`: {why}" for name, why in table.left_out.items()]
    return "\n".join(lines) + "\n"


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
