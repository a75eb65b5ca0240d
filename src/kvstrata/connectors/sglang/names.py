"""What SGLang's pages are called in a node: keys in the namespace of the weights of the moment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvstrata.connectors.sglang.renewals import Generation
from kvstrata.errors import KVStrataError
from kvstrata.keys import Namespace
from kvstrata.pagekeys import PageKeys

logger = logging.getLogger(__name__)


class Names:
    """Namespace and keys of one storage.

    Args:
        namespace: finds the namespace of a generation of weights; None: not known yet.
        generation: of the weights.
    """

    def __init__(
        self, namespace: Callable[[str], Namespace | None], generation: Generation
    ) -> None:
        self._find = namespace
        self.generation = generation
        self._known: dict[str, tuple[Namespace, bytes]] = {}
        self._keys: dict[tuple[bytes, bytes], PageKeys] = {}
        self.problem = ""

    def forget(self) -> None:
        """The pools have changed, and with them the namespaces."""
        self._known, self._keys = {}, {}

    def namespace(self, generation: str) -> Namespace | None:
        """The namespace of what these weights compute; None: it is not known, or never will be."""
        known = self._known.get(generation)
        if known is None and not self.problem:
            try:
                found = self._find(generation)
            except (KVStrataError, OSError) as error:
                self.problem = str(error)
                logger.error("KVStrata leaves this engine's KV uncached: %s", error)
                return None
            if found is None:
                return None
            known = found, found.digest()
            self._known = {generation: known}  # the weights before are gone for good
        return known[0] if known is not None else None

    def digest(self, generation: str) -> bytes:
        """32 bytes, or none where `namespace` is None."""
        self.namespace(generation)
        known = self._known.get(generation)
        return known[1] if known is not None else b""

    def keys(self, secret: bytes, digest: bytes, hashes: Sequence[str]) -> list[bytes]:
        """Keys of pages with these hashes, as SGLang writes them: 64 hex digits.

        Raises:
            UsageError: a hash of another length.
            ValueError: a hash that is none.
        """
        keys = self._keys.get((secret, digest))
        if keys is None:
            if len(self._keys) > 8:  # of namespaces and secrets that have gone
                self._keys = {}
            keys = self._keys[secret, digest] = PageKeys(secret, digest)
        return keys.of([bytes.fromhex(page) for page in hashes])
