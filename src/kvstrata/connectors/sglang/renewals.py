"""What becomes of what is stored when SGLang's weights are exchanged where they are.

SGLang throws away what it holds itself, not what a storage has. So a new namespace begins. What the
old weights computed may still lie in SGLang's own pools: until these are flushed nothing is stored.

A process has one engine, and an engine may have one storage after another (they are detached and
attached over HTTP), so which weights it has is the process's to know.
"""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)


class Generation:
    """Which weights an engine computes with, by how often they were exchanged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._doubtful = "", False
        self.loaded_at = 0
        """When the model was loaded, Unix time in ns; 0: nobody said."""

    @property
    def name(self) -> str:
        """Part of the namespace; empty: the weights are those that the engine started with."""
        return self._name

    def storable(self) -> str | None:
        """The name; None where SGLang may still hold what other weights have computed."""
        with self._lock:
            return None if self._doubtful else self._name

    def renew(self, name: str = "") -> None:
        """The weights are about to change.

        Args:
            name: the same on all ranks, and of nothing else; made up where there is one rank.
        """
        with self._lock:
            self._name, self._doubtful = name or os.urandom(16).hex(), True
        logger.info("KVStrata: new weights; nothing is cached until SGLang's cache is flushed")

    def flushed(self) -> None:
        """SGLang holds nothing any more that was computed before."""
        with self._lock:
            doubtful, self._doubtful = self._doubtful, False
        if doubtful:
            logger.info("KVStrata: what the new weights compute is cached from now on")


OF_THIS_PROCESS = Generation()
"""The one of this process's engine."""
