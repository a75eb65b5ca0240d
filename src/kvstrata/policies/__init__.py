"""Whom to evict: one policy a file, chosen by name."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvstrata.errors import ConfigError
from kvstrata.policies.base import Evictable, Policy
from kvstrata.policies.cost import CostAware
from kvstrata.policies.lru import LRU
from kvstrata.policies.s3fifo import S3FIFO

__all__ = ["LRU", "POLICIES", "S3FIFO", "CostAware", "Evictable", "Policy", "create_policy"]

POLICIES: dict[str, type[Policy]] = {"lru": LRU, "s3fifo": S3FIFO, "cost": CostAware}


def create_policy(
    name: str, capacity_bytes: int, clock: Callable[[], float] = time.monotonic
) -> Policy:
    """Make the policy that a configuration names.

    Raises:
        ConfigError: no policy has that name; the message lists those that exist.
    """
    try:
        kind = POLICIES[name]
    except KeyError:
        names = ", ".join(sorted(POLICIES))
        raise ConfigError("policy", f"unknown policy {name!r}, expected one of {names}") from None
    return kind(capacity_bytes, clock)
