"""One attached model: its calls of ``generate`` find what earlier ones have computed.

Nothing here raises into ``generate``, and nothing waits longer than the configured deadlines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvstrata.config import Config
from kvstrata.connectors.attachment import Attachment
from kvstrata.connectors.transformers.calls import Call, look_at
from kvstrata.connectors.transformers.contents import forget_past, take
from kvstrata.connectors.transformers.kinds import new_cache
from kvstrata.connectors.transformers.loads import Load, Loads
from kvstrata.connectors.transformers.ragged import is_kept
from kvstrata.connectors.transformers.records import record_of
from kvstrata.connectors.transformers.selected import Selected, Selections
from kvstrata.connectors.transformers.stores import Left, Stores
from kvstrata.connectors.transformers.subject import Subject
from kvstrata.connectors.transformers.subject import look_at as look_at_model
from kvstrata.connectors.transformers.tally import Tally
from kvstrata.connectors.transformers.wishes import ARGUMENT, Wish, wish_of
from kvstrata.connectors.transformers.witness import witness
from kvstrata.errors import KVStrataError
from kvstrata.keys import Namespace
from kvstrata.wire.client import NodeClient
from kvstrata.wire.namespaces import Described

logger = logging.getLogger(__name__)

#: how long the start waits for the weights' identity; calls wait for nothing
IDENTITY_WAIT_S = 10.0
#: for so long a node that did not answer in time is not asked again
BACK_OFF_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Args:
        prompt_tokens: of its prompt; 0 where it was left to the model.
        loaded_tokens: those that were loaded.
        bypassed: why it was left to the model alone; "": it was not.
        missed: why less was loaded than might have been, where something failed.
        load_s: seconds that asking and loading took.
        selected: of a call that is answered from selected tokens, whether these were ``found`` or
            ``made``; "": the answer is exact.
        unselected: why it is exact though a selection was asked for.
    """

    prompt_tokens: int = 0
    loaded_tokens: int = 0
    bypassed: str = ""
    missed: str = ""
    load_s: float = 0.0
    selected: str = ""
    unselected: str = ""


@dataclass
class _Plan:
    """A call under way that uses the cache."""

    subject: Subject
    described: Described
    call: Call
    cache: Any
    load: Load
    began: float
    selected: Selected | None = None


class Attached:
    """What `kvstrata.connectors.transformers.attach` gives; usable as a context manager.

    Threads may generate at the same time.

    Args:
        model: that is attached; it is not kept alive.
        config: KVStrata's.
        detach: takes the hook off the model.
        context_tokens: as of `kvstrata.connectors.transformers.attach`.
        wish: the selection of calls that do not say.
    Raises:
        Incompatible: the model is left uncached, or selects no tokens, in words.
    """

    def __init__(
        self,
        model: Any,
        config: Config,
        detach: Callable[[], None],
        context_tokens: int | None = None,
        wish: Wish | None = None,
    ) -> None:
        self._config = config
        self._wish = wish
        self._detach = detach
        self._tally = Tally()
        self._lock = threading.Lock()
        self._hashing = ThreadPoolExecutor(1, "kvstrata-identity")
        self._context_tokens = context_tokens
        self._subject: Subject | None = self._look_at(model)
        self._refused = ""
        self._told: set[tuple[bytes, Namespace]] = set()
        self._quiet_until = 0.0
        self._closed = False
        deadlines = config.deadlines
        self._attachment = Attachment(config, "model", lambda client: None)
        self._loads = Loads(config.tenant, deadlines.request, deadlines.load)
        self._stores = Stores(self._attachment, self._tally, config.tenant, deadlines.request)
        self._selections = Selections(
            config, self._asking, self._loads, self._stores, self._tally, self._tell
        )
        #: of the last call that has begun
        self.last = Outcome()
        if wish is not None:
            try:
                self._selections.able(model, self._subject)
            except KVStrataError:
                self.close()
                raise
        self._attachment.wait(deadlines.attach)
        self._subject.wait(IDENTITY_WAIT_S)

    # for whoever attached it

    def stats(self) -> dict[str, Any]:
        """Counts so far.

        ``calls``, of those that were not bypassed ``prompt_tokens`` and ``loaded_tokens``;
        ``stored_chunks`` and ``skipped_stores``; ``selected_calls``, ``found_selections`` and
        ``stored_selections``; ``bypassed``, ``unselected`` and ``errors`` by their names.
        """
        return self._tally.take()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what calls have computed so far is stored; False: not in this time."""
        return self._stores.flush(timeout_s)

    def renew(self) -> None:
        """The model was changed in a way that torch does not count: identify it anew."""
        with self._lock:
            self._subject = None

    def detach(self) -> None:
        """Take the hook off the model, store what waits, and let go of the node. Repeatable."""
        self._detach()
        self.close()

    def close(self) -> None:
        """The same, but for the hook. Repeatable."""
        self._closed = True
        self._stores.close()
        self._selections.close()
        self._attachment.close()
        self._hashing.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # for the hook

    def generate(
        self,
        model: Any,
        plain: Callable[..., Any],
        named: Callable[[], dict[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer a call.

        Args:
            model: that is asked.
            plain: its own ``generate``.
            named: finds the call's arguments by their names.
            args, kwargs: of the call; ``kvstrata`` is taken out.
        Raises:
            UsageError: ``kvstrata`` says what cannot be.
        """
        wish = wish_of(kwargs.pop(ARGUMENT, None), self._wish)
        plan = self._begin(model, named, wish)
        if plan is None:
            return plain(*args, **kwargs)
        with_cache = plan.call.with_cache(kwargs, plan.cache)
        if plan.selected is not None:
            result = plan.selected.generate(model, args, with_cache)
            self._end_selected(plan, result)
            return result
        result = plain(*args, **with_cache)
        self._end(model, plan, result)
        return result

    def _begin(
        self, model: Any, named: Callable[[], dict[str, Any]], wish: Wish | None
    ) -> _Plan | None:
        """What is loaded for a call; None: it is left to the model alone."""
        self._tally.add(calls=1)
        try:
            return self._plan(model, named, wish)
        except KVStrataError as error:
            self._bypass("no identity", str(error))
        except Exception as error:
            # Arguments that transformers refuses: it is asked next, and says so itself.
            logger.debug("KVStrata leaves a call to the model", exc_info=True)
            self._bypass(f"{type(error).__name__} at its beginning")
        return None

    def _plan(
        self, model: Any, named: Callable[[], dict[str, Any]], wish: Wish | None
    ) -> _Plan | None:
        began = time.monotonic()
        if self._closed:
            return self._bypass("detached")
        arguments = named()
        handed = arguments.get("past_key_values")
        if is_kept(handed):
            del arguments["past_key_values"]
        call = look_at(model, arguments)
        if isinstance(call, str):
            return self._bypass(call)
        subject = self._current(model)
        if subject is None:
            return self._bypass("the model was changed", self._refused)
        described = subject.described()
        if described is None:
            return self._bypass("still hashing the weights")
        if is_kept(handed):
            going_on = Selected(
                self._selections.able(model, subject), handed, Load([]), 0, "handed"
            )
            return self._selected(subject, described, call, going_on, began)
        unselected = ""
        if wish is not None:
            chosen = self._selections.begin(model, subject, described, call, wish)
            if isinstance(chosen, Selected):
                return self._selected(subject, described, call, chosen, began)
            unselected = chosen
            self._tally.note("unselected", unselected)
        cache = new_cache(model)
        load = self._load(subject, described, call, cache)
        if not load.loaded:
            cache = new_cache(model)
        cache.activate_past_recording()
        loaded = load.loaded * subject.kinds.chunk_tokens
        self._tally.add(prompt_tokens=len(call.tokens), loaded_tokens=loaded)
        self.last = Outcome(
            len(call.tokens), loaded, "", load.failed, load.seconds, unselected=unselected
        )
        return _Plan(subject, described, call, cache, load, began)

    def _selected(
        self, subject: Subject, described: Described, call: Call, chosen: Selected, began: float
    ) -> _Plan:
        """A call that is answered from selected tokens, and what is known of it so far."""
        load = chosen.load
        self._tally.add(
            prompt_tokens=len(call.tokens), loaded_tokens=chosen.loaded, selected_calls=1,
            found_selections=int(chosen.how == "found"),
        )  # fmt: skip
        if load.failed and load.keys:
            self._note_failed(load)
        self.last = Outcome(
            len(call.tokens), chosen.loaded, "", load.failed, load.seconds, chosen.how
        )
        return _Plan(subject, described, call, chosen.cache, load, began, chosen)

    def _current(self, model: Any) -> Subject | None:
        """The model as it is now; None: it has become one that is left uncached."""
        with self._lock:
            subject = self._subject
            if subject is not None and witness(model) == subject.seen:
                return subject
            self._subject = None
            try:
                self._subject = self._look_at(model)
            except KVStrataError as error:
                if str(error) != self._refused:
                    self._refused = str(error)
                    logger.warning("KVStrata leaves this model uncached: %s", error)
            return self._subject

    def _look_at(self, model: Any) -> Subject:
        return look_at_model(model, self._config, self._hashing, self._context_tokens)

    def _load(self, subject: Subject, described: Described, call: Call, cache: Any) -> Load:
        """Ask the node, unless there is none, or it has just been too slow."""
        if time.monotonic() < self._quiet_until:
            return Load([], failed="the node was too slow", too_late=True)
        with self._asking() as client:
            if client is None:
                return Load([], failed="no node")
            self._tell(client, described)
            load = self._loads.load(client, subject.kinds, described, call.tokens, cache)
        if load.failed:
            self._note_failed(load)
        return load

    @contextmanager
    def _asking(self) -> Iterator[NodeClient | None]:
        """The node's client, unless there is none, or it has just been too slow."""
        if time.monotonic() < self._quiet_until:
            yield None
            return
        with self._attachment.client() as client:
            if client is None:
                self._tally.note("errors", "no node")
            yield client

    def _note_failed(self, load: Load) -> None:
        self._tally.note("errors", "a load failed")
        if load.too_late:
            self._quiet_until = time.monotonic() + BACK_OFF_S
        logger.info("KVStrata: a load failed, the model computes: %s", load.failed)

    def _end(self, model: Any, plan: _Plan, result: Any) -> None:
        """Leave what a call has computed to be stored; never raises."""
        try:
            kinds, first = plan.subject.kinds, plan.load.loaded
            sequences = result if hasattr(result, "shape") else result.sequences
            tokens = sequences[0].tolist()
            taken = take(plan.cache, kinds, first, tokens)
            forget_past(plan.cache, kinds)
            if taken is None or tokens[: len(plan.call.tokens)] != plan.call.tokens:
                self._tally.note("errors", "the cache was left otherwise")
            elif witness(model) != plan.subject.seen:
                self._tally.note("errors", "the model was changed meanwhile")
            elif taken.num_chunks > first:
                # What the caller is handed may be changed before it is stored.
                taken = taken.copied() if plan.call.keeps_cache else taken
                parts, model_told = plan.described.parts, plan.described.model
                # A table of a codec's damage is of the files, and found by them.
                weights = model_told["weights"] if parts.pages else ""
                self._stores.add(Left(parts, taken, weights))
            self._record(plan, len(tokens))
        except Exception:
            logger.exception("KVStrata: the end of a call died of a bug")
            self._tally.note("errors", "a bug")

    def _end_selected(self, plan: _Plan, result: Any) -> None:
        """Tell of a call that was answered from selected tokens; never raises."""
        try:
            sequences = result if hasattr(result, "shape") else result.sequences
            if plan.load.keys:
                self._record(plan, len(sequences[0]))
        except Exception:
            logger.exception("KVStrata: the end of a call died of a bug")
            self._tally.note("errors", "a bug")

    def _record(self, plan: _Plan, num_tokens: int) -> None:
        with self._attachment.client() as client:
            if client is not None:
                names = ["host", *client.hello.tiers]
                size = plan.subject.kinds.chunk_tokens
                client.record(
                    record_of(plan.load, len(plan.call.tokens), num_tokens, size, plan.began, names)
                )

    def _tell(self, client: NodeClient, described: Described) -> None:
        """Tell a node, once, what the namespace is made of: so an operator can compare two."""
        told = client.hello.node, described.parts
        if told not in self._told:
            self._told.add(told)
            client.record(described.record())

    def _bypass(self, why: str, detail: str = "") -> _Plan | None:
        """Leave a call to the model, and say so."""
        self._tally.note("bypassed", why)
        self.last = Outcome(bypassed=f"{why}: {detail}" if detail else why)
        return None
