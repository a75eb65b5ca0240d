"""A place for engines and their node to meet, and what a test may ask of the node there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.engine import NEW_TOKENS, Answer, Engine
from tests.engine.service import Serviced

from kvstrata.header import object_id
from kvstrata.testing.engine import CONNECTOR
from kvstrata.testing.workplace import wait_ready

PATIENCE_S = 240.0


class Place(Serviced):
    """Engines of one node, in a folder of their own; leaving it ends them all."""

    def __init__(
        self, model: Path, settings: Mapping[str, Any] | None = None, service: bool | str = False
    ) -> None:
        # On a busy machine seconds may pass before the node has its turn; that is no one's fault.
        # And a tiny model computes sooner than a busy disk brings.
        # Most tests count whole chunks; those of what is inside them set their own.
        defaults = {
            "host.capacity": "1GiB", "deadlines.request": "30s", "planner": "off", "inside": "off",
        }  # fmt: skip
        super().__init__(model, {**defaults, **(settings or {})}, service)
        self._was_stopped = False
        self._refused: dict[str, float] = {}

    def engine(  # type: ignore[override]
        self,
        with_kvstrata: bool = True,
        environment: Mapping[str, str] | None = None,
        model: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        connector: Mapping[str, str] = CONNECTOR,
        fresh: bool = False,
        new_tokens: int = NEW_TOKENS,
        **options: Any,
    ) -> Engine:
        """Begin to start an engine; the first one with KVStrata starts the node."""
        if with_kvstrata:
            options["kv_transfer_config"] = {
                **connector,
                "kv_connector_extra_config": {**self._settings, **(settings or {})},
            }
        log = self.folder / f"engine-{len(self._engines)}-{os.urandom(2).hex()}.log"
        around = {"XDG_RUNTIME_DIR": str(self.folder), **(environment or {})}
        engine = Engine(model or self._model, log, around, options, fresh, new_tokens)
        self._engines.append(engine)
        return engine

    def end(self) -> None:
        """End every process here and wait for that; the folder stays."""
        self._node, self._refused, self._was_stopped = None, {}, False
        super().end()

    def set(self, option: str, value: str) -> None:
        """One more of KVStrata's options, for what is started from now on."""
        self._settings[option] = value

    def use_disk(self) -> None:
        """A disk tier in this folder, for what is started from now on."""
        self.set("disk.path", str(self.folder / "disk"))
        self.set("disk.capacity", "4GiB")
        self.set("disk.write_queue", "1GiB")
        self.set("disk.codec", "lossless")  # not one token may change
        # A scrub would find what a test broke before a request does.
        self.set("disk.scrub_rate", "0")

    def file(self, key: bytes, rank: int = 0) -> Path:
        """The disk tier's file of one object."""
        name = object_id(key, 0, rank).hex()
        (path,) = (self.folder / "disk" / "objects").rglob(f"{name}-*.kvo")
        return path

    def count(self, name: str) -> float:
        """A counter of the node; all of them whose name begins so, summed."""
        counters = self.node.status()["counters"]
        return float(sum(value for key, value in counters.items() if key.startswith(name)))

    def last_record(self, engine_tokens: int) -> dict[str, Any]:
        """The record of the request that ended last, once it is one of so many tokens."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = self.node.status()["requests"][-1:]
            return bool(found) and found[0]["tokens"] == engine_tokens

        eventually(there, f"the record of a request of {engine_tokens} tokens")
        return found[0]

    def loaded(self, prompt: Sequence[int], answer: Answer) -> int:
        """Tokens of the answer just given that came from the node, as that recorded it.

        vLLM goes on counting what a load was to bring as cached when the load ends early.
        """
        count: int = self.last_record(len(prompt) + len(answer.tokens))["loaded_tokens"]
        return count

    def await_ready(self, engine: Engine) -> None:
        """Return once the engine is up and its node knows what is on the disk."""
        engine.wait()
        wait_ready(self.node, PATIENCE_S)

    def flush(self) -> None:
        """Return once everything is written behind."""
        self.node.flush(PATIENCE_S)

    def await_stored(
        self, engine: Engine, sequences: Sequence[Sequence[int]], ranks: int = 1
    ) -> None:
        """Return once all whole chunks of these tokens are in the node."""
        for tokens in sequences:
            keys = engine.keys(tokens)
            eventually(
                lambda keys=keys: 255 not in self.node.lookup(keys, list(range(ranks))),  # type: ignore[misc]
                f"{len(keys)} chunks stored",
            )

    @contextmanager
    def stopped_at_load(self, engine: Engine) -> Iterator[None]:
        """Stop the node when this engine's next load begins; leaving the block, it goes on."""
        pid = self.node.hello.pid
        self._was_stopped = True
        engine.call("stop_at_load", pid=pid)
        try:
            yield
        finally:
            engine.call("stop_no_more")
            os.kill(pid, signal.SIGCONT)

    def check(self) -> None:
        """After every scenario: nothing is held any more, nothing was refused, no bug was hit."""

        def quiet() -> bool:
            leases = self.node.status()["leases"]
            return not any(leases[held] for held in ("count", "reservations", "bytes"))

        eventually(quiet, "all leases and reservations returned")
        counters = self.node.status()["counters"]
        assert not {name for name in counters if name.startswith("bugs_")}
        refused = {k: v for k, v in counters.items() if k.startswith("requests_refused_")}
        # A node that was stopped may hear of a lease's end before a worker's question about it,
        # which came on another connection, and refuses that.
        assert self._was_stopped or refused == self._refused
        self._refused, self._was_stopped = refused, False


def known_tokens(prompt: Sequence[int], answer: Answer) -> list[int]:
    """The tokens whose KV an answered request leaves: all but the last new one."""
    return [*prompt, *answer.tokens[:-1]]


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it holds; fail when it does not for this long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
