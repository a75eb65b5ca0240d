"""``codec = auto``: what the model's own table says, within the operator's bound.

The codec depends on the model, so a writer names the weights that made the KV, and the first
object of a model costs its table's reading. Without a table, or where nothing in it keeps the
bound, objects are stored losslessly: nothing is ever lossy by default.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvstrata.errors import KVStrataError
from kvstrata.node.coding.choosing import Choice
from kvstrata.node.coding.recoding import warm_up
from kvstrata.quality.choice import Place, allowed, candidates, choose

if TYPE_CHECKING:
    from kvstrata.codecs import Codec
    from kvstrata.quality.bound import Bound
    from kvstrata.quality.table import Measured

logger = logging.getLogger(__name__)

RETRY_S = 60.0
MEASURE_S = 1.0
MAX_MODELS = 64

_IDENTITY = re.compile(r"[0-9a-f]{64}")


class Placed(Protocol):
    """A tier in service, as far as the choice of its codec goes."""

    name: str
    capacity_bytes: int

    @property
    def writable(self) -> bool: ...

    def place(self) -> Place | None: ...


class Auto(Choice):
    """What the model's table says of one tier; see `Tables`."""

    lossless = False
    needs_speed = True

    def __init__(self, tables: Tables, tier: str) -> None:
        self._tables = tables
        self._tier = tier

    @property
    def name(self) -> str:  # type: ignore[override]
        chosen = self._tables.chosen(self._tier)
        return f"auto ({', '.join(chosen)})" if chosen else "auto"

    def of(self, weights: str, compute_s: float, place: Place | None) -> Codec | None:
        return self._tables.codecs(weights, compute_s)[self._tier]


class Tables:
    """The choices for all tiers with ``codec = auto``, made together and once a model.

    Args:
        bound: what damage the operator allows.
        folder: where the tables of `kvstrata quality` lie.
        clock: monotonic seconds.
    """

    def __init__(self, bound: Bound, folder: Path, clock: Callable[[], float]) -> None:
        self.backings: list[Placed] = []
        self._bound = bound
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._codecs: dict[str, dict[str, Codec | None]] = {}
        self._retry_at: dict[str, float] = {}

    def chosen(self, tier: str) -> list[str]:
        """Names of the codecs in use on a tier."""
        codecs = [of_tier.get(tier) for of_tier in self._codecs.copy().values()]
        return sorted({codec.name if codec is not None else "raw" for codec in codecs})

    def codecs(self, weights: str, compute_s: float) -> dict[str, Codec | None]:
        """The codec of each tier for the KV of these weights."""
        if not _IDENTITY.fullmatch(weights):
            weights = ""  # a model without a table, whatever it calls itself
        with self._lock:
            due = self._retry_at.get(weights, math.inf if weights in self._codecs else 0.0)
            if self._clock() >= due:
                self._codecs.pop(weights, None)
                self._codecs[weights] = self._resolve(weights, compute_s)
                if len(self._codecs) > MAX_MODELS:
                    oldest = next(iter(self._codecs))
                    del self._codecs[oldest]
                    self._retry_at.pop(oldest, None)
            return self._codecs[weights]

    def _resolve(self, weights: str, compute_s: float) -> dict[str, Codec | None]:
        from kvstrata.codecs import codec_named

        rows = self._rows(weights)
        unmeasured = [b.name for b in self.backings if b.writable and b.place() is None]
        if rows and unmeasured:
            # Their scans have not ended; the choice is for all tiers, and for long.
            self._retry_at[weights] = self._clock() + MEASURE_S
            rows = []
        places = [b.place() or Place(b.name, b.capacity_bytes, 1e9, 1) for b in self.backings]
        options = candidates(rows)
        names = (
            choose(options, places, compute_s)
            if rows
            else dict.fromkeys([place.name for place in places], "lossless")
        )
        codecs: dict[str, Codec | None] = {}
        for place in places:
            name = names[place.name]
            codecs[place.name] = codec_named(name) if name != "raw" else None
            logger.info("KV of weights %s is stored in %s as %s (%s; the tier reads %.0f MB/s)",
                        weights[:16] or "unknown", place.name, name, self._bound,
                        place.bytes_per_s / 1e6)  # fmt: skip
        for codec in codecs.values():
            if codec is not None:
                warm_up(codec)
        return codecs

    def _rows(self, weights: str) -> list[Measured]:
        """What may be chosen for a model, the lossless ones included; empty: do not choose."""
        self._retry_at.pop(weights, None)
        if not weights:
            return []
        from kvstrata.quality.table import load

        path = self._folder / f"{weights}.json"
        try:
            table = load(path)
        except (OSError, KVStrataError) as error:
            self._retry_at[weights] = self._clock() + RETRY_S
            logger.error("codec = auto, but no table says what codecs do to the model of weights "
                         "%s (%s): run kvstrata quality on its folder; until then its KV is "
                         "stored losslessly", weights[:16], error)  # fmt: skip
            return []
        if table.weights != weights:
            logger.error("%s is the table of another model; stored losslessly", path)
            return []
        rows = [row for row in table.codecs if _is_what_it_was(row)]
        lossy = allowed(rows, self._bound)
        if not lossy:
            logger.warning("no lossy codec in the table of %s keeps %s; its KV is stored "
                           "losslessly, or as it is", table.model, self._bound)  # fmt: skip
        return [*lossy, *(row for row in rows if row.lossless)]


def _is_what_it_was(row: Measured) -> bool:
    """Whether the codec that was measured is the one that would be used."""
    from kvstrata.codecs import codec_named

    try:
        codec = codec_named(row.name)
    except KVStrataError as error:
        logger.info("%s was measured, and cannot be chosen: %s", row.name, error)
        return False
    same = (codec.parameters().hex(), codec.lossless) == (row.parameters, row.lossless)
    if not same:
        logger.warning("%s was measured in another version; measure again", row.name)
    return same
