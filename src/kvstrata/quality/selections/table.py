"""The measured table of selections: its fields, and who is on the frontier of bytes and KL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvstrata.quality.table import Estimate, cache_folder, replace_file

VERSION = 1

CODEC = "codec"
METHOD = "method"
PRESS = "kvpress"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One way to make a context smaller.

    Args:
        name: as a user writes it.
        kind: a method of ours, one of kvpress, or a codec, which keeps every token.
        identity: all its parameters, in words or, of a codec, in hex.
        fraction: of the rows that are kept; 1 for a codec.
        bits: of an element of the whole context, positions, counts and headers included.
        seconds: to select, the most of all contexts: processor time, of a press of kvpress time on
            the wall; 0 for a codec.
        perplexity: of the continuation, over that of the exact cache, less 1.
        kl: KL(exact || smaller) of the continuation's next tokens, nats.
        questions, worst: KL of the answers to the questions on one cache: the mean of all, and the
            worst question of each context.
        agreement: share of the continuation's positions with the same most likely token.
        retrieval: facts told over those that the exact cache tells; None if it tells none.
        rules: share of positions of the rules' answers with the exact cache's token.
        rules_by_place: the same of each rule by itself, first to last.
    """

    name: str
    kind: str
    identity: str
    fraction: float
    bits: float
    seconds: float
    perplexity: Estimate
    kl: Estimate
    questions: Estimate
    worst: Estimate
    agreement: Estimate
    retrieval: Estimate | None
    rules: Estimate
    rules_by_place: tuple[float, ...]

    @property
    def label(self) -> str:
        """Its name, with the fraction where it selects."""
        return self.name if self.kind == CODEC else f"{self.name} {self.fraction:g}"


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one run measured.

    Args:
        version: of this form.
        kvstrata: the release.
        model: a name for people.
        weights: `kvstrata.identity.weights_identity` of the model's folder.
        windows, length: how many contexts, of how many tokens.
        questions: asked on each.
        machine: what the seconds were measured on.
        exact_perplexity, exact_retrieval: of the exact cache; the share of facts that it tells.
        rows: codecs, then methods, each at every fraction.
        left_out: why what was asked for is not there, by its name.
    """

    version: int = VERSION
    kvstrata: str
    model: str
    weights: str
    windows: int
    length: int
    questions: int
    machine: str
    exact_perplexity: float
    exact_retrieval: float
    rows: tuple[Row, ...]
    left_out: dict[str, str]


def frontier(rows: Iterable[Row], value: str = "kl") -> set[str]:
    """Labels of the rows that no other beats: none has fewer bits and no more of a value.

    Args:
        rows: of the table.
        value: a field of `Row` that is an estimate: ``kl``, ``questions`` or ``worst``.
    """

    def place(row: Row) -> tuple[float, float]:
        return row.bits, getattr(row, value).value

    best, labels = float("inf"), set()
    for row in sorted(rows, key=place):
        if place(row)[1] < best:
            best = place(row)[1]
            labels.add(row.label)
    return labels


def best_codec(row: Row, rows: Iterable[Row], value: str = "kl") -> Row | None:
    """The codec that has no more bits than a selection and the least of a value; None: none has.

    Args:
        row: that selects.
        rows: of the table.
        value: a field of `Row` that is an estimate: ``kl``, ``questions`` or ``worst``.
    """
    codecs = [other for other in rows if other.kind == CODEC and other.bits <= row.bits]
    return min(codecs, key=lambda other: getattr(other, value).value, default=None)


def save(table: Table, path: Path) -> None:
    """Write the table, whole or not at all."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")


def path_for(weights: str) -> Path:
    """Where the table of these weights lies."""
    return cache_folder() / "selection" / f"{weights}.json"
