"""The measured table: its fields, its file, and where that lies.

A file is JSON, version 1, of exactly the fields below. It lies under the identity of the weights
it was measured on, so that whoever has the weights finds it and nobody takes another model's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from kvstrata.errors import CorruptObject, Incompatible, UsageError

T = TypeVar("T")

VERSION = 1


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure and its 95% confidence interval."""

    value: float
    low: float
    high: float


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One codec at one context length.

    Args:
        length: tokens of the context; 0 for all lengths together.
        bits: of an element, all overhead included.
        key_error, value_error: root mean squared error over root mean square, mean of the layers.
        perplexity: of the continuation, over that of the exact cache, less 1.
        kl_mean, kl_p99: KL(exact || decoded) of the next token, nats.
        agreement: share of positions with the same most likely token.
        retrieval: facts found over those found on the exact cache, where that finds at least
            80% (of a depth and length); None where it never does.
        rules: share of positions of the rules' answers with the exact cache's most likely token.
        rules_nats: how much less likely these answers are than on the exact cache, nats a token.
        rules_by_place: ``rules`` for each place in the system prompt, first to last.
    """

    length: int
    bits: float
    key_error: float
    value_error: float
    perplexity: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    agreement: Estimate
    retrieval: Estimate | None
    rules: Estimate
    rules_nats: Estimate
    rules_by_place: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller than bfloat16."""
        return 16 / self.bits


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One codec: its name, what exactly it was, and its scores.

    Args:
        name: as an operator writes it.
        family: as in an object's header.
        parameters: as in an object's header, in hex; another version has others.
        lossless: as the codec claims and every chunk confirmed.
        encode_gbps, decode_gbps: raw KV per second of one core, 1e9 bytes.
        scores: all lengths together first, then each.
    """

    name: str
    family: str
    parameters: str
    lossless: bool
    encode_gbps: float
    decode_gbps: float
    scores: tuple[Scores, ...]

    def at(self, length: int = 0) -> Scores:
        """The scores at a length; by default of all together."""
        for scores in self.scores:
            if scores.length == length:
                return scores
        raise UsageError(f"{self.name} was not measured at {length} tokens")


class Exact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The exact cache at one length, with which all else is compared.

    Args:
        retrieval: share of facts found, for each depth, first to last.
        rules: share of the tokens of the rules' answers that it predicts.
    """

    length: int
    perplexity: float
    retrieval: tuple[float, ...]
    rules: float


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one run measured, or several over the same windows.

    Args:
        version: of this form.
        kvstrata: the release that measured last.
        model: a name for people.
        weights: `kvstrata.identity.weights_identity` of the model's folder.
        text: xxh3_128 of the token ids of all windows, in hex: equal texts, equal windows.
        windows: how many there were.
        lengths: of contexts, tokens.
        machine: what the speeds were measured on.
        exact: the exact cache, for each length.
        codecs: in the order of the registry, then calibrations, then the baselines.
        left_out: why a codec that was asked for is not there, by its name.
    """

    version: int = VERSION
    kvstrata: str
    model: str
    weights: str
    text: str
    windows: int
    lengths: tuple[int, ...]
    machine: str
    exact: tuple[Exact, ...]
    codecs: tuple[Measured, ...]
    left_out: dict[str, str]

    def codec(self, name: str) -> Measured:
        """One codec's row.

        Raises:
            UsageError: it was not measured.
        """
        for measured in self.codecs:
            if measured.name == name:
                return measured
        have = ", ".join(measured.name for measured in self.codecs)
        raise UsageError(f"the table of {self.model} has no {name}; it has {have}")


def cache_folder() -> Path:
    """Where KVStrata keeps what it can make again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvstrata"


def path_for(weights: str) -> Path:
    """Where the table of these weights lies."""
    return cache_folder() / "quality" / f"{weights}.json"


def save(table: Table, path: Path) -> None:
    """Write the table, whole or not at all."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that everyone may read, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, whole = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(whole, 0o644)
        os.replace(whole, path)
    except BaseException:
        os.unlink(whole)
        raise


def load(path: Path) -> Table:
    """Read a table that `save` wrote.

    Raises:
        FileNotFoundError: there is none.
        Incompatible: it is of another version.
        CorruptObject: it is no table.
    """
    table = read_table(path, Table, VERSION, "quality")
    for measured in table.codecs:
        if tuple(scores.length for scores in measured.scores) != (0, *table.lengths):
            raise CorruptObject(f"{path}: {measured.name} lacks some of the lengths")
        if not all(scores.bits > 0 for scores in measured.scores):
            raise CorruptObject(f"{path}: {measured.name} has elements of no bits")
    return table


def read_table(path: Path, kind: type[T], version: int, of: str) -> T:
    """Read a table of some kind, whose fields it checks, and no more.

    Args:
        path: of the file.
        kind: of table; it has a field ``version``.
        version: that is read.
        of: what it is a table of, for errors.
    Raises:
        FileNotFoundError: there is none.
        Incompatible: it is of another version.
        CorruptObject: it is no such table.
    """
    content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=_Version).version
        if found != version:
            raise Incompatible(f"{path}: table of version {found}, not {version}; measure again")
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptObject(f"{path} is no table of {of}: {error}") from error


class _Version(msgspec.Struct):
    version: int


def frontier(codecs: Iterable[Measured], length: int = 0) -> set[str]:
    """Names of the codecs that no other beats: none has fewer bits and no more divergence."""
    best, names = float("inf"), set()
    for measured in sorted(codecs, key=lambda m: (m.at(length).bits, m.at(length).kl_mean.value)):
        if measured.at(length).kl_mean.value < best:
            best = measured.at(length).kl_mean.value
            names.add(measured.name)
    return names
