"""The table of blending as people read it: cells of text, and the Markdown of the documentation."""

from __future__ import annotations

from kvstrata.quality.blending.table import BlendTable, Row
from kvstrata.quality.forms import line, percent, small, spread

HEADINGS = (
    "plan", "ratio", "computed", "KL mean", "KL p95", "gap closed", "over random", "perplexity",
    "same token", "answer, nats", "retrieval",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One row, under `HEADINGS`."""
    return (
        row.plan,
        _how_many(row),
        percent(row.computed),
        spread(row.kl_mean, small),
        small(row.kl_p95.value),
        spread(row.closed, percent),
        spread(row.over_random, percent),
        spread(row.perplexity, lambda value: f"{100 * value:+.2f}%"),
        percent(row.agreement.value),
        spread(row.answer_nats, lambda value: f"{value:+.3f}"),
        spread(row.retrieval, percent),
    )


def _how_many(row: Row) -> str:
    if row.bound is not None:
        return f"bound {row.bound:g}"
    return f"{row.ratio:g}" if row.ratio else "-"


def markdown(table: BlendTable) -> str:
    """The whole table for the page of documentation."""
    lines = [
        f"{table.model} (weights {table.weights[:16]}), KVStrata {table.kvstrata}, windows: "
        f"{table.windows}, each of {table.documents} documents of {table.document_tokens} tokens.",
        "",
        f"The exact cache: perplexity {table.perplexity:.2f}, facts found by document "
        f"{' '.join(map(percent, table.found))}.",
        "",
        line(HEADINGS),
        line(["---"] * len(HEADINGS)),
    ]
    for row in table.rows:
        name, *rest = cells(row)
        lines.append(line([f"`{name}`", *rest]))
    if any(table.found):
        lines += ["", "**Facts found by document**, first to last in the prompt", ""]
        heads = ["plan", "ratio", *map(str, range(1, table.documents + 1))]
        lines += [line(heads), line(["---"] * len(heads))]
        for row in table.rows:
            lines.append(line([f"`{row.plan}`", cells(row)[1], *map(percent, row.found)]))
    if table.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- `{name}`: {why}" for name, why in table.left_out.items()]
    return "\n".join(lines) + "\n"
