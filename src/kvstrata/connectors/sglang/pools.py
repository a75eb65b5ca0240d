"""The host pools that SGLang has registered, each a layer group of its own."""

from __future__ import annotations

import logging
from typing import Any

from kvstrata.connectors.sglang.pages import KV, Pages, describe
from kvstrata.connectors.sglang.proof import prove
from kvstrata.errors import KVStrataError

logger = logging.getLogger(__name__)

STATES = "mamba"
"""SGLang's pool of recurrent states, which ranks hold in parts even where they share a latent."""


class Pools:
    """Pools by SGLang's names, and the numbers of their objects.

    Args:
        storage_config: what SGLang gave the storage: ranks and their number.
        page_tokens: tokens of a page of the prompt.
        foreign: byte orders of other engines that are read as well, by name.
    """

    def __init__(
        self, storage_config: Any, page_tokens: int, foreign: tuple[str, ...] = ()
    ) -> None:
        self._config = storage_config
        self._foreign = foreign
        self.page_tokens = page_tokens
        self._pools: dict[str, Pages] = {}
        self._groups: dict[str, int] = {}
        self.problems: dict[str, str] = {}

    def register(self, pool: Any, name: str) -> None:
        """Take in a pool; one that is not understood is a problem, in words, and no more."""
        try:
            pages = describe(pool, name, self.page_tokens, self._foreign)
            prove(pages, pool)
        except KVStrataError as error:
            self.problems[name] = f"pool {name} ({type(pool).__name__}): {error}"
            return
        except Exception as error:
            logger.exception("KVStrata: a host pool of SGLang's could not be looked at")
            self.problems[name] = f"pool {name} ({type(pool).__name__}): {error!r}"
            return
        self.add(pages)

    def add(self, pages: Pages) -> None:
        """Take in pages that are proven."""
        self.problems.pop(pages.name, None)
        self._pools[pages.name] = pages
        # By name, whatever order they come in; the namespace has all of them in it.
        others = sorted(one for one in self._pools if one != KV)
        self._groups = {KV: 0, **{one: i for i, one in enumerate(others, 1)}}

    def get(self, name: str) -> Pages | None:
        """The pages of a pool; None: it is not cached."""
        return self._pools.get(name)

    def part(self, name: str) -> int:
        """The number of this rank's objects of a pool: ``group << 16 | rank``."""
        config = self._config
        shared = bool(config.is_mla_model) and name != STATES
        rank = int(config.pp_rank * config.tp_size + (0 if shared else config.tp_rank))
        return self._groups[name] << 16 | rank

    def group(self, name: str) -> int:
        """The number of a pool's layer group."""
        return self._groups[name]

    @property
    def names(self) -> list[str]:
        """Of the pools that are cached, ``kv`` first."""
        return sorted(self._pools, key=lambda name: self._groups[name])

    @property
    def layout(self) -> str:
        """The logical layout of all of them, in one canonical text."""
        return " + ".join(self._pools[name].layout for name in self.names)
