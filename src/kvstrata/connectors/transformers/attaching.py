"""The hook on a model: its ``generate``, on this one object, and nothing else of transformers."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import types
import weakref
from typing import Any

from transformers import __version__ as transformers_version

from kvstrata.config import load_config
from kvstrata.connectors.transformers.session import Attached
from kvstrata.connectors.transformers.wishes import ARGUMENT, Wish, wish_of
from kvstrata.errors import UsageError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("5.19.0",)

_SESSIONS: weakref.WeakKeyDictionary[Any, Attached] = weakref.WeakKeyDictionary()


def attach(
    model: Any,
    *,
    context_tokens: int | None = None,
    selection: str | None = None,
    keep: float | None = None,
    **options: Any,
) -> Attached:
    """Let a model's ``generate`` find what it, or another process, has computed before.

    Waits until a node is there, or cannot be had, and some seconds at most for the weights to be
    hashed; runs a few tokens through the model. Afterwards ``model.generate(...)`` is called as
    ever, by whomever: a pipeline, too.

    Args:
        model: of transformers, on one device, in evaluation mode.
        context_tokens: the longest context that vLLM or SGLang are told, where ``share`` has
            ``engines``; None: the model's own.
        selection: a method by which tokens of each call's context are selected; answers are other
            ones than exact then. None: of calls that ask for it alone. See ``docs/selection.md``.
        keep: the fraction that is kept then, above 0, at most 1.
        options: of KVStrata, nested (``host={"capacity": "4GiB"}``) or dotted; on top of its
            environment and its file. See ``docs/configuration.md``.
    Returns:
        What tells how it goes, and ends it.
    Raises:
        ConfigError: an option is wrong.
        Incompatible: the model is left uncached, or its tokens are not to be selected, in words.
        UsageError: it is attached already, or its ``generate`` is another's; or no such selection.
    """
    if model in _SESSIONS:
        raise UsageError("this model is attached already")
    if "generate" in vars(model):
        raise UsageError("this model's generate is not its class's, so it cannot be taken over")
    said = {"selection": selection, "keep": keep}
    wish = wish_of({name: value for name, value in said.items() if value is not None} or None)
    attached = session_of(model, options, context_tokens, wish)
    original = type(model).generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(original, self)
        # A copy of the model has this function too, and is another model.
        if _SESSIONS.get(self) is not attached:
            kwargs.pop(ARGUMENT, None)
            return plain(*args, **kwargs)
        named = functools.partial(_named, original, self, args, kwargs)
        return attached.generate(self, plain, named, args, kwargs)

    model.generate = types.MethodType(generate, model)
    return attached


def detach(model: Any) -> None:
    """Undo `attach`; nothing happens to a model that is not attached."""
    if (attached := _SESSIONS.get(model)) is not None:
        attached.detach()


def session_of(
    model: Any,
    options: dict[str, Any] | None = None,
    context_tokens: int | None = None,
    wish: Wish | None = None,
) -> Attached:
    """The session of a model, begun if there is none; its ``generate`` stays as it is.

    Raises:
        ConfigError, Incompatible: as `attach`.
    """
    if (known := _SESSIONS.get(model)) is not None:
        return known
    config = load_config(overrides=options or {})
    logging.getLogger("kvstrata").setLevel(config.log.upper())
    if transformers_version not in TESTED_VERSIONS:
        logger.warning(
            "KVStrata was tested with transformers %s, not with %s; its self-test at start decides "
            "whether the cache is understood",
            ", ".join(TESTED_VERSIONS), transformers_version,
        )  # fmt: skip
    unhook = functools.partial(_unhook, weakref.ref(model))
    attached = Attached(model, config, unhook, context_tokens, wish)
    _SESSIONS[model] = attached
    weakref.finalize(model, _end, attached)
    return attached


def _unhook(reference: weakref.ref[Any]) -> None:
    model = reference()
    if model is not None and _SESSIONS.pop(model, None) is not None:
        vars(model).pop("generate", None)


def _end(attached: Attached) -> None:
    """Close the session of a model that has gone; whichever thread found that out waits not."""
    try:
        threading.Thread(target=attached.close, name="kvstrata-end", daemon=True).start()
    except RuntimeError:  # the interpreter ends, and so have our threads
        attached.close()


def _named(
    original: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names."""
    bound = inspect.signature(original).bind(model, *args, **kwargs).arguments
    more = bound.pop("kwargs", {})
    bound.pop("self", None)
    return {**bound, **more}
