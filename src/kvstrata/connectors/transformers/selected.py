"""Answers from kept tokens: found, or made of the exact cache first; the same ones either way.

What a call that asks for a selection computes with is always what was kept, so whether it was there
or not changes no answer. The exact cache is made as ever, with what the node has of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace

from kvstrata.config import Config
from kvstrata.connectors.transformers import kept_objects as objects
from kvstrata.connectors.transformers.calls import Call
from kvstrata.connectors.transformers.kept_objects import Place
from kvstrata.connectors.transformers.kept_proof import prove_kept
from kvstrata.connectors.transformers.kinds import Kinds, new_cache
from kvstrata.connectors.transformers.loads import Load, Loads
from kvstrata.connectors.transformers.ragged import NAME, answering, cache_of
from kvstrata.connectors.transformers.stores import Stores
from kvstrata.connectors.transformers.subject import Subject
from kvstrata.connectors.transformers.tally import Tally
from kvstrata.connectors.transformers.twins import twin_of
from kvstrata.connectors.transformers.wishes import Wish
from kvstrata.connectors.transformers.witness import witness
from kvstrata.errors import DeadlineExceeded, Incompatible, KVStrataError
from kvstrata.observe.reasons import Reason, Why
from kvstrata.selection.kept import Kept
from kvstrata.wire.client import NodeClient
from kvstrata.wire.namespaces import Described

logger = logging.getLogger(__name__)

SHORT = "a context shorter than a chunk"
LITTLE = "a budget of less than a token for each head"
FAILED = "the selection failed"
CHANGED = "the model was changed meanwhile"
UNFIT = "the model is none for it"


@dataclass(frozen=True)
class Able:
    """A model whose tokens can be selected.

    Args:
        subject: as it was looked at.
        answers: its twin with attention to kept tokens.
        selects: its twin that a method may run, one at a time.
        lock: of that one.
    """

    subject: Subject
    answers: Any
    selects: Any
    lock: threading.Lock


@dataclass
class Selected:
    """A call that is answered from kept tokens.

    Args:
        able: the model.
        cache: that begins with them.
        load: what came of asking for them; where they were made, of asking for the exact cache.
        loaded: tokens that they stand for, or that were loaded of the exact cache.
        how: ``found``, ``made``, or ``handed`` in by the caller.
    """

    able: Able
    cache: Any
    load: Load
    loaded: int
    how: str

    def generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer, by the model's twin, on the cache that is among the arguments."""
        twin = self.able.answers
        twin.generation_config = model.generation_config
        with answering():
            return type(model).generate(twin, *args, **kwargs)


class Selections:
    """Of one attached model; from whichever thread.

    Args:
        config: KVStrata's.
        asking: gives the node's client, or None where it is not to be asked.
        loads: of exact KV.
        stores: keeps what was made.
        tally: counts that.
        tell: tells the node of a namespace.
    """

    def __init__(
        self,
        config: Config,
        asking: Callable[[], AbstractContextManager[NodeClient | None]],
        loads: Loads,
        stores: Stores,
        tally: Tally,
        tell: Callable[[NodeClient, Described], None],
    ) -> None:
        self._config = config
        self._asking = asking
        self._loads = loads
        self._stores = stores
        self._tally = tally
        self._tell = tell
        self._lock = threading.Lock()
        self._able: Able | None = None
        self._unfit: tuple[Subject, str] | None = None

    def close(self) -> None:
        """Let go of the twins, which hold on to the weights. Repeatable."""
        with self._lock:
            self._able = self._unfit = None

    def able(self, model: Any, subject: Subject) -> Able:
        """A model's twins, made when they are first wanted.

        Raises:
            Incompatible: tokens of its cache are not to be selected; the message says why.
        """
        with self._lock:
            if self._able is not None and self._able.subject is subject:
                return self._able
            if self._unfit is not None and self._unfit[0] is subject:
                raise Incompatible(self._unfit[1])
            try:
                self._able = able(model, subject)
            except Incompatible as error:
                self._unfit = subject, str(error)
                logger.warning("KVStrata selects no tokens of this model: %s", error)
                raise
            return self._able

    def begin(
        self, model: Any, subject: Subject, described: Described, call: Call, wish: Wish
    ) -> Selected | str:
        """What a call is answered from, or why that is the exact cache."""
        size, before = subject.kinds.chunk_tokens, len(call.tokens) - 1
        chunks = min(wish.context or before, before) // size
        if not chunks:
            return SHORT
        try:
            ready = self.able(model, subject)
        except Incompatible:
            return UNFIT
        place = Place.of(described, subject.kinds.each[0], wish.text(), wish.keep)
        layers, _, heads, rows, _ = place.shape(chunks)
        if rows < layers * heads:
            return LITTLE
        tokens, cache, exact = call.tokens[: chunks * size], new_cache(model), Load([])
        with self._asking() as client:
            if client is None:
                kept, load = None, Load([], failed="no node")
            else:
                self._tell(client, place.described)
                kept, load = self._found(client, place, call.tokens, chunks, bool(wish.context))
                if kept is None and not load.too_late:
                    # Of what is asked for the last token is left out, so it is one more.
                    more = [*tokens, 0]
                    exact = self._loads.load(client, subject.kinds, described, more, cache)
        if kept is not None:
            cache = cache_of(kept, subject.kinds.device)
            return Selected(ready, cache, load, kept.prompt_tokens, "found")
        try:
            cache = _computed(model, subject.kinds, tokens, cache, exact.loaded)
            with ready.lock:
                kept = wish.selector.select(ready.selects, cache, tokens, wish.keep)
            if witness(model) != subject.seen:
                return CHANGED
            self._leave(place, tokens, kept, described)
        except KVStrataError as error:
            logger.warning("KVStrata selects no tokens for a call: %s", error)
            return FAILED
        except Exception:
            logger.exception("KVStrata: selecting tokens failed, the call is answered exactly")
            return FAILED
        load.found = load.loaded = exact.loaded
        load.tiers, load.origins = exact.tiers[: exact.loaded], exact.origins
        load.why = _for_rest(load)
        cache = cache_of(kept, subject.kinds.device)
        return Selected(ready, cache, load, exact.loaded * size, "made")

    def _found(
        self, client: NodeClient, place: Place, tokens: Sequence[int], chunks: int, exactly: bool
    ) -> tuple[Kept | None, Load]:
        """What is kept of the chunks before a question, or of enough of them."""
        begun, deadlines = time.monotonic(), self._config.deadlines
        whole = (len(tokens) - 1) // place.kind.chunk_tokens
        keys = place.keys(client.hello.secret, tokens, whole)
        kept, load = None, Load(keys)
        try:
            deepest = chunks
            if not exactly:
                at_least = max(1, int(objects.ENOUGH * chunks))
                some = keys[:chunks]
                deepest = objects.find(client, place, some, at_least, deadlines.request) or chunks
            kept, load = objects.load(
                client, place, keys, deepest, self._config.tenant, deadlines.request,
                deadlines.load,
            )  # fmt: skip
            if kept is not None:
                load.why = _for_rest(load)
        except KVStrataError as error:
            load.failed = f"{type(error).__name__}: {error}"
            load.too_late = isinstance(error, DeadlineExceeded)
        load.seconds = time.monotonic() - begun
        return kept, load

    def _leave(self, place: Place, tokens: Sequence[int], kept: Kept, described: Described) -> None:
        """Check what was kept, and have it stored behind the model's back.

        Raises:
            UsageError: it is not what fits the budget, or the model.
        """
        chunks = len(tokens) // place.kind.chunk_tokens
        place.check(kept, chunks)
        weights = described.model["weights"] if described.parts.pages else ""
        deadlines, tenant = self._config.deadlines, self._config.tenant

        def write(client: NodeClient) -> None:
            keys = place.keys(client.hello.secret, tokens, chunks)
            if objects.store(client, place, keys, kept, tenant, weights, deadlines.request):
                self._tally.add(stored_selections=1)

        self._stores.submit(write)


def _for_rest(load: Load) -> list[Reason]:
    """Why the chunks behind what was loaded were not: one reason for all of them."""
    if not (left := len(load.keys) - load.loaded):
        return []
    why = load.why[0] if load.why else Reason(Why.NEVER, left)
    return [replace(why, chunks=left)]


@torch.no_grad()
def _computed(model: Any, kinds: Kinds, tokens: Sequence[int], cache: Any, loaded: int) -> Any:
    """The exact cache of a context, of whose chunks so many were loaded."""
    if not loaded:
        cache = new_cache(model)
    if rest := list(tokens[loaded * kinds.chunk_tokens :]):
        ids = torch.tensor([rest], device=kinds.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def able(model: Any, subject: Subject) -> Able:
    """Make a model's twins, and try them.

    Raises:
        Incompatible: tokens of its cache are not to be selected; the message says why.
    """
    kinds = subject.kinds
    group = kinds.each[0].group
    if len(kinds.each) > 1 or group.kind != "full":
        others = {f"{kind.group.kind} attention" for kind in kinds.each} - {"full attention"}
        raise Incompatible(
            "tokens are selected where all layers have full attention of one shape, and it has "
            + (", ".join(sorted(others)) or "layers of several shapes")
        )
    answers = twin_of(model, NAME)
    prove_kept(model, answers, kinds)
    return Able(subject, answers, twin_of(model), threading.Lock())
