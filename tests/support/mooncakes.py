"""Clients and tiers of a real Mooncake Store, for tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstrata.errors import TierUnavailable
from kvstrata.testing.servers.mooncake import MooncakeServer
from kvstrata.tiers.mooncake.client import Client, Open
from kvstrata.tiers.mooncake.settings import Settings, parse_master
from kvstrata.tiers.mooncake.tier import MooncakeTier

LASTS_S = 5.0
MIB = 1 << 20


def client_of(server: MooncakeServer, **settings: Any) -> Client:
    return Client(Settings(master=parse_master(server.address), **settings))


def tier_of(server: MooncakeServer, prefix: str = "here", **settings: Any) -> MooncakeTier:
    return MooncakeTier(client_of(server, **settings), prefix, LASTS_S)


class Borrowed(Client):
    """A client of its own to the tier that has it. Within is one that stays open: the library takes
    up to a second to close one, and the contract closes a hundred."""

    def __init__(self, owner: Client) -> None:
        super().__init__(owner.settings)
        self.owner = owner

    @contextmanager
    def use(self) -> Iterator[Open]:
        if self._closed:
            raise TierUnavailable("the tier is closed")
        with self.owner.use() as current:
            yield current

    def answered(self, codes: Sequence[int]) -> Sequence[int]:
        return self.owner.answered(codes)

    def bind(self, pool: memoryview) -> None:
        self.owner.bind(pool)


class WithClients(MooncakeServer):
    """A server that comes back for clients that knew it before: each loses one call by that."""

    clients: tuple[Client, ...] = ()

    def restart(self) -> None:
        super().restart()
        for client in self.clients:
            until_it_answers(MooncakeTier(client, "anywhere", LASTS_S))


def until_it_answers(tier: MooncakeTier) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            tier.stat([b"anything"])
            return
        except TierUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)
