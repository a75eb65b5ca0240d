"""Engines that tests share: each is started when the first test asks for it, and kept.

Tests that share must not meet: every test asks about documents of its own (the fixture ``texts``),
compares counters with what they were before, and leaves the engine and the node as it found them.
A test that kills, restarts or resets takes a `Place` of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tests.engine.engine import Engine
from tests.engine.place import Place
from tests.engine.plain import Plain

SETTINGS = {"host.capacity": "256MiB", "deadlines.load": "3s"}


class Shared(NamedTuple):
    """A place with its node, and an engine there."""

    place: Place
    engine: Engine


class Engines:
    """Every engine of this session that more than one test uses.

    Whoever asks with the same arguments gets the same engine. None is waited for before it is
    asked something, so those that a test needs start side by side. An engine takes a GiB and more,
    so those that few files ask for end with the file.
    """

    def __init__(self) -> None:
        self._ends = ExitStack()
        self._of_file = ExitStack()
        self._plain: dict[str, Plain] = {}
        self._kept: set[str] = set()
        self._places: dict[Path, Place] = {}
        self._engines: dict[str, Engine] = {}

    def plain(self, model: Path, *, keep: bool = False, **options: Any) -> Plain:
        """Plain vLLM with this model.

        Args:
            keep: beyond the file that asks for it first.
            options: of `Place.engine`.
        """
        known = repr((model, keep, sorted(options.items())))
        if known not in self._plain:
            if keep:
                self._kept.add(known)
            place = (self._ends if keep else self._of_file).enter_context(Place(model))
            self._plain[known] = Plain(place.engine(with_kvstrata=False, **options))
        return self._plain[known]

    def shared(self, model: Path, number: int = 0, **options: Any) -> Shared:
        """An engine with KVStrata, on the one node that all of this model's engines share.

        The node has 256 MiB of host memory and a lossless disk below it.

        Args:
            number: other numbers are other engines with the same options.
            options: of `Place.engine`.
        """
        if model not in self._places:
            place = self._ends.enter_context(Place(model, SETTINGS))
            place.use_disk()
            self._places[model] = place
        place = self._places[model]
        known = repr((model, number, sorted(options.items())))
        if known not in self._engines:
            self._engines[known] = place.engine(**options)
        return Shared(place, self._engines[known])

    def leave_file(self) -> None:
        """End what is not kept beyond a file."""
        self._of_file.close()
        self._plain = {known: self._plain[known] for known in self._kept}

    def close(self) -> None:
        """End them all. Repeatable."""
        self._of_file.close()
        self._ends.close()
