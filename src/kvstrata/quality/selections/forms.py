"""The table of selections as people read it: cells of text, and the documentation's Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.quality.forms import line, percent, small, spread
from kvstrata.quality.selections.table import CODEC, Row, Table, best_codec, frontier

HEADINGS = (
    "what", "kept", "bits", "ratio", "KL", "questions", "worst question", "perplexity",
    "same token", "facts", "rules", "seconds", "best codec at no more bytes",
)  # fmt: skip


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """One row, under `HEADINGS`.

    Args:
        row: of the table.
        rows: all of them.
    """
    return (
        row.name,
        "all" if row.kind == CODEC else percent(row.fraction),
        f"{row.bits:.2f}",
        f"{16 / row.bits:.2f}",
        spread(row.kl, small),
        small(row.questions.value),
        small(row.worst.value),
        f"{100 * row.perplexity.value:+.1f}%",
        percent(row.agreement.value),
        spread(row.retrieval, percent),
        percent(row.rules.value),
        "-" if row.kind == CODEC else f"{row.seconds:.1f}",
        verdict(row, rows),
    )


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """How a selection stands against codecs that have no more bytes, by the KL of the text and
    by that of the questions.
    """
    if row.kind == CODEC:
        return ""
    words = []
    for what, value in (("text", "kl"), ("questions", "questions")):
        best = best_codec(row, rows, value)
        if best is None:
            return "none is as small"
        wins = getattr(row, value).value < getattr(best, value).value
        words.append(f"{what}: {'beats' if wins else 'loses to'} {best.name.partition('@')[0]}")
    return "; ".join(words)


def ordered(table: Table) -> list[Row]:
    """Codecs by their bits, then what selects: the largest budget first, in each by KL."""
    return sorted(
        table.rows,
        key=lambda row: (
            row.kind != CODEC,
            -row.fraction,
            row.bits if row.kind == CODEC else row.kl.value,
        ),
    )


def markdown(table: Table) -> str:
    """The whole table for the page of documentation."""
    rows = ordered(table)
    best = frontier(rows)
    lines = [
        f"{table.model} (weights {table.weights[:16]}), KVStrata {table.kvstrata}, contexts: "
        f"{table.windows} of {table.length} tokens, {table.questions} questions on each, "
        f"{table.machine}. The exact cache: perplexity {table.exact_perplexity:.2f}, "
        f"{percent(table.exact_retrieval)} of the facts.",
        "",
        line(HEADINGS),
        line(["---"] * len(HEADINGS)),
    ]
    for row in rows:
        name, *rest = cells(row, rows)
        lines.append(line([f"`{name}`{' *' if row.label in best else ''}", *rest]))
    lines += ["", "**Rules by their place** (share of equal tokens, first rule to last)", ""]
    places = len(rows[0].rules_by_place) if rows else 0
    heads = ["what", "kept", *map(str, range(1, places + 1))]
    lines += [line(heads), line(["---"] * len(heads))]
    for row in rows:
        shares = map(percent, row.rules_by_place)
        lines.append(line([f"`{row.name}`", cells(row, rows)[1], *shares]))
    if table.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- `{name}`: {why}" for name, why in table.left_out.items()]
    return "\n".join(lines) + "\n"
