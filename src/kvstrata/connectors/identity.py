"""What the engines' connectors have in common where they find out whose KV it is."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from kvstrata.config import Config
from kvstrata.errors import ConfigError
from kvstrata.quality.bound import Bound
from kvstrata.quality.choice import trouble

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cache_file() -> Path:
    """Where hashes of weight files are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvstrata" / "weights"


def succeeded(future: Future[Any]) -> bool:
    """Whether it has a result: not if it still runs, failed, or was cancelled by the end."""
    return future.done() and not future.cancelled() and future.exception() is None


def found(future: Future[T], what: str) -> T:
    """What was found out; whatever went wrong means that nothing may be cached."""
    error = future.exception()
    if error is not None:
        raise ConfigError(what, f"its identity cannot be had: {error}") from error
    return future.result()


def from_anywhere(described: Any) -> Any:
    """The same wherever configurations inside it were read from: EAGLE's has the head's in it."""
    if not isinstance(described, dict):
        return described
    return {
        name: "" if name == "_name_or_path" else from_anywhere(value)
        for name, value in described.items()
    }


def explain_auto(config: Config, model: str, weights: str) -> None:
    """Say at the start, and where the operator looks, why ``codec = auto`` stays lossless."""
    names = [part.name for part in config.tiers if part.codec == "auto"]
    if names and (why := trouble(weights, Bound.parse(config.quality), model)):
        logger.error("KVStrata: %s.codec is auto, but stores losslessly: %s", names[0], why)
