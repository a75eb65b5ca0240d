"""One rank's way to a node: its pools, its namespace, and who reads and writes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from msgspec.structs import replace

from kvstrata.config import Config
from kvstrata.connectors.attachment import Attachment
from kvstrata.connectors.sglang.engines import engines_namespace, orders_of
from kvstrata.connectors.sglang.fingerprint import Identity, resolved
from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.loads import Loads
from kvstrata.connectors.sglang.lookups import Lookups, Wanted
from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.pages import KV
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.records import record_of
from kvstrata.connectors.sglang.renewals import OF_THIS_PROCESS
from kvstrata.connectors.sglang.stats import Tally
from kvstrata.connectors.sglang.stores import Stores
from kvstrata.errors import ConfigError, KVStrataError
from kvstrata.keys import Namespace
from kvstrata.wire.client import NodeClient

logger = logging.getLogger(__name__)

#: how long the start waits for the weights' identity; later requests wait for nothing
IDENTITY_WAIT_S = 10.0


class Session:
    """What a storage does, once it is known that it may.

    Args:
        config: KVStrata's.
        server_args: SGLang's arguments.
        storage_config: ranks and their number.
    """

    def __init__(self, config: Config, server_args: Any, storage_config: Any) -> None:
        self._config = config
        arguments = resolved(server_args)
        self._page_tokens = int(arguments.page_size)
        shares = "engines" in config.share
        foreign = orders_of(self._page_tokens) if shares else ()
        pools = self._pools = Pools(storage_config, self._page_tokens, foreign)
        self._share: Callable[[dict[str, Any]], Namespace] | None = None
        if shares:
            self._share = lambda model: engines_namespace(
                arguments, storage_config, pools, model, config.tenant
            )
        self._identity = Identity(server_args, storage_config, config.tenant)
        self._names = Names(self._namespace, OF_THIS_PROCESS)
        self._tally = Tally()
        self._told: set[tuple[bytes, Namespace]] = set()
        self._holds = Holds(config.deadlines.load, self._ended)
        lookups = Lookups(self._names, self._pools, self._holds, config.tenant,
                          config.deadlines.request)  # fmt: skip
        self._lookups = lookups
        self._loads = Loads(self._pools, lookups, self._holds, self._tally, config.deadlines.load)
        self._stores = Stores(self._names, self._pools, self._tally, config.tenant,
                              config.deadlines.request)  # fmt: skip
        who = f"storage of rank {storage_config.tp_rank}"
        self._attachment = Attachment(config, who, self._holds.drop)

    @property
    def problems(self) -> list[str]:
        """What of SGLang's pools is not understood, in words."""
        return list(self._pools.problems.values())

    def register(self, pool: Any, name: str) -> None:
        """Take in one of SGLang's host pools."""
        self._pools.register(pool, name)
        self._names.forget()

    def ready(self) -> None:
        """SGLang has registered its pools and is about to begin."""
        self._attachment.wait(self._config.deadlines.attach)
        self._identity.wait(IDENTITY_WAIT_S)

    def prefix(self, hashes: Sequence[str], before: Sequence[str], wanted: list[Wanted]) -> int:
        """How many leading pages can be had; see `Lookups.prefix`."""
        generation = self._names.generation.storable()
        if generation is None or any(self._pools.get(one.name) is None for one in wanted):
            return 0
        with self._attachment.client() as client:
            if client is None:
                return 0
            self._tell(client, generation)
            return self._lookups.prefix(client, generation, hashes, before, wanted)

    def boundaries(
        self, hashes: Sequence[str], before: Sequence[str], wanted: list[Wanted]
    ) -> tuple[int, list[int]]:
        """The same, and every number of leading pages that can be gone on from."""
        count = self.prefix(hashes, before, wanted)
        generation = self._names.generation.storable()
        if not count or generation is None or not any(one.last for one in wanted):
            return count, list(range(1, count + 1))
        with self._attachment.client() as client:
            good = [] if client is None else self._lookups.restorable(
                client, generation, hashes[:count], wanted
            )  # fmt: skip
        return (count, good) if count in good else (count, [*good, count])

    def read(self, name: str, hashes: Sequence[str], indices: torch.Tensor | None) -> int:
        """Fill pages of a pool; how many leading ones were filled."""
        generation = self._names.generation.storable()
        starts = self._starts(name, len(hashes), indices)
        if generation is None or not starts:
            return 0
        with self._attachment.client() as client:
            if client is None:
                return 0
            return self._loads.read(client, generation, name, hashes, starts)

    def write(
        self,
        name: str,
        before: Sequence[str],
        hashes: Sequence[str],
        indices: torch.Tensor | None,
    ) -> list[bool]:
        """Store pages of a pool; of each whether it is kept now."""
        generation = self._names.generation.storable()
        starts = self._starts(name, len(hashes), indices)
        nothing = [False] * len(hashes)
        if generation is None or not starts:
            return nothing
        with self._attachment.client() as client:
            if client is None:
                return nothing
            self._tell(client, generation)
            weights = "" if generation else self._identity.weights
            return self._stores.write(client, generation, name, before, hashes, starts, weights)

    def stats(self) -> Any:
        """For SGLang's own metrics."""
        return self._tally.take()

    def close(self) -> None:
        """End what is under way and let go of the node. Repeatable."""
        self._holds.close()
        self._attachment.close()
        self._identity.close()

    # how

    def _namespace(self, generation: str) -> Namespace | None:
        if self._pools.get(KV) is None:
            raise ConfigError("pools", "; ".join(self.problems) or "SGLang has registered none")
        layout, share = self._pools.layout, self._share
        return self._identity.namespace(layout, self._page_tokens, generation, share)

    def _starts(self, name: str, count: int, indices: torch.Tensor | None) -> list[int]:
        """The first index of each page; none where SGLang's are not those of so many pages."""
        pages = self._pools.get(name)
        if pages is None or indices is None or not count:
            return []
        if indices.numel() != count * pages.stride:
            logger.error(
                "KVStrata: SGLang gives %d indices of pool %s for %d pages of %d",
                indices.numel(), name, count, pages.stride,
            )  # fmt: skip
            return []
        starts: list[int] = indices[:: pages.stride].tolist()
        return starts

    def _tell(self, client: NodeClient, generation: str) -> None:
        """Tell a node, once, what the namespace is made of: so an operator can compare two."""
        namespace = self._names.namespace(generation)
        if namespace is None or (told := (client.hello.node, namespace)) in self._told:
            return
        described = self._identity.describe(namespace, generation)
        if described is None:
            return
        self._told.add(told)
        known = [(name, pages) for name in self._pools.names if (pages := self._pools.get(name))]
        described = replace(
            described,
            orders=list(dict.fromkeys(order for _, pages in known for order in pages.orders)),
            objects=[self._pools.part(name) for name, _ in known],
            lengths=[pages.nbytes for _, pages in known],
        )
        with contextlib.suppress(KVStrataError):  # a request is served without it
            client.record(described.record())

    def _ended(self, hold: Hold) -> None:
        """Hand in the record of a prefetch that has ended."""
        with contextlib.suppress(KVStrataError):
            names = ["host", *hold.client.hello.tiers]
            shares = self._identity.shares
            hold.client.record(record_of(hold, self._page_tokens, names, shares=shares))
