"""The measured table of blending: its fields, its file, and where that lies.

A file is JSON, version 1, of exactly the fields below. Tables of two models come with the package;
one that was measured here lies beside the tables of codecs and goes before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstrata.blend import Rule
from kvstrata.errors import CorruptObject, UsageError
from kvstrata.quality.table import Estimate, cache_folder, read_table, replace_file

VERSION = 1


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One plan at one ratio, over all windows. KL is KL(exact || blended) of the next token.

    Args:
        plan: as a request names it, or a method of `kvstrata.quality.blending.ways`.
        ratio: of the reused tokens, how many the plan may compute anew.
        bound: where that is what it went by, instead of a ratio; see `kvstrata.blend.choose`.
        computed: of the reused tokens, how many it did; a token in some of the layers counts by
            their share.
        kl_mean, kl_p95: nats a position of a continuation: the mean, the 95th percentile.
        closed: share of the KL of ``none`` that is gone: 1 is exact, below 0 is worse. Where
            another model's KV is reused: of the KL of all its layers.
        over_random: share of the KL that is left by as many random tokens, which is gone; None
            but for plans that choose tokens.
        perplexity: of the continuation, over that of the exact cache, less 1.
        agreement: share of positions with the same most likely token.
        answer_nats: how much less likely the right answers about facts are, nats a token.
        retrieval: facts found over those that the exact cache finds, of the documents where it
            finds at least 80%; None where there is no such document.
        found: share of facts found, for each document, first to last.
    """

    plan: str
    ratio: float
    computed: float
    kl_mean: Estimate
    kl_p95: Estimate
    closed: Estimate
    over_random: Estimate | None
    perplexity: Estimate
    agreement: Estimate
    answer_nats: Estimate
    retrieval: Estimate | None
    found: tuple[float, ...]
    bound: float | None = None

    @property
    def rule(self) -> Rule:
        """What the plan went by."""
        return Rule(self.plan, self.ratio, self.bound)


class BlendTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one run measured.

    Args:
        version: of this form.
        kvstrata: the release that measured.
        model: a name for people.
        weights: `kvstrata.identity.weights_identity` of the model's folder.
        layers: of the model.
        text: xxh3_128 of the token ids of all windows, in hex.
        windows: how many there were.
        documents: in each window, all but the head reused.
        document_tokens: of each document.
        perplexity: of the continuations on the exact cache.
        found: share of facts that the exact cache finds, for each document, first to last.
        rows: ``unturned`` and ``none`` first.
        left_out: why a method that was asked for is not there, by its name.
    """

    version: int = VERSION
    kvstrata: str
    model: str
    weights: str
    layers: int
    text: str
    windows: int
    documents: int
    document_tokens: int
    perplexity: float
    found: tuple[float, ...]
    rows: tuple[Row, ...]
    left_out: dict[str, str]

    def row(self, plan: str, ratio: float, bound: float | None = None) -> Row:
        """One plan at one ratio, or by one bound.

        Raises:
            UsageError: it was not measured.
        """
        for row in self.rows:
            if row.rule == (plan, ratio, bound):
                return row
        raise UsageError(f"the table of {self.model} has no {Rule(plan, ratio, bound)}")


def path_for(weights: str) -> Path:
    """Where a table of these weights lies that was measured here."""
    return cache_folder() / "quality" / f"{weights}.blend.json"


def shipped_path(weights: str) -> Path:
    """Where the package's own table of these weights lies, if it has one."""
    return Path(__file__).parent / "tables" / f"{weights}.json"


def find(weights: str) -> BlendTable | None:
    """The table of these weights: of this machine, else of the package.

    Raises:
        Incompatible, CorruptObject: as `load`.
    """
    for path in (path_for(weights), shipped_path(weights)):
        try:
            return load(path)
        except FileNotFoundError:
            continue
    return None


def save(table: BlendTable, path: Path) -> None:
    """Write the table, whole or not at all."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")


def load(path: Path) -> BlendTable:
    """Read a table that `save` wrote.

    Raises:
        FileNotFoundError: there is none.
        Incompatible: it is of another version.
        CorruptObject: it is no table.
    """
    table = read_table(path, BlendTable, VERSION, "blending")
    shares = [share for row in table.rows for share in (row.ratio, row.bound) if share is not None]
    if table.layers < 1 or not all(0 <= share <= 1 for share in shares):
        raise CorruptObject(f"{path}: a model without layers, or a ratio or bound above 1")
    return table


def ratios(rows: Sequence[Row], plan: str) -> list[float]:
    """The ratios that a plan was measured at, ascending."""
    return sorted(row.ratio for row in rows if row.plan == plan and row.bound is None)
