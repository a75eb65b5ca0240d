"""What becomes of what is stored when SGLang's weights are exchanged where they are.

SGLang throws away what it holds itself, not what a storage has. So a new namespace begins. What the
old weights computed may still lie in SGLang's own pools: until these are flushed nothing is stored.
"""

from __future__ import annotations

import os
import threading
import weakref


class Generation:
    """Which weights a storage's engine computes with, by how often they were exchanged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._doubtful = "", False
        _EVERY.add(self)

    @property
    def name(self) -> str:
        """Part of the namespace; empty: the weights are those that the engine started with."""
        return self._name

    def storable(self) -> str | None:
        """The name; None where SGLang may still hold what other weights have computed."""
        with self._lock:
            return None if self._doubtful else self._name

    def renew(self, name: str) -> None:
        """The weights are about to change."""
        with self._lock:
            self._name, self._doubtful = name, True

    def flushed(self) -> None:
        """SGLang holds nothing any more that was computed before."""
        with self._lock:
            self._doubtful = False


_EVERY: weakref.WeakSet[Generation] = weakref.WeakSet()


def renew_all(name: str = "") -> None:
    """The weights of this process's engine are about to change.

    Args:
        name: the same on all ranks, and of nothing else; made up where there is one rank.
    """
    name = name or os.urandom(16).hex()
    for generation in list(_EVERY):
        generation.renew(name)


def flushed_all() -> None:
    """This process's engine has flushed its own caches."""
    for generation in list(_EVERY):
        generation.flushed()
