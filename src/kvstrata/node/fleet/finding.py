"""Peers that the registry knows: who holds the head of what is looked for is asked for the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.config.network import FLEET, MAX_PEERS, NetworkConfig, PeerConfig
from kvstrata.errors import ConfigError, TierUnavailable
from kvstrata.fleet import holdings
from kvstrata.fleet.members import Member
from kvstrata.fleet.registry import Registry
from kvstrata.node.node import Node
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer.tcp import Address

logger = logging.getLogger(__name__)


class Finding:
    """Keeps a node's peers what the registry says, if it is configured so.

    Args:
        registry: of the fleet.
        tier: the peers; None: they are not found here.
        network: how the node may meet them.
    """

    def __init__(self, registry: Registry, tier: PeerTier | None, network: NetworkConfig) -> None:
        self._registry = registry
        self._tier = tier
        self._network = network
        self._members: dict[Address, Member] = {}
        self._refused: set[str] = set()
        if tier is not None:
            tier.find = self._find

    @classmethod
    def of(cls, node: Node, registry: Registry) -> Finding:
        """As configured."""
        part = node.config.tier("peer")
        found = isinstance(part, PeerConfig) and part.nodes == FLEET
        tiers = [one.tier for one in node.backings if isinstance(one.tier, PeerTier)]
        return cls(registry, tiers[0] if tiers and found else None, node.config.network)

    @property
    def wanted(self) -> bool:
        """Whether the node has peers to find."""
        return self._tier is not None

    def close(self) -> None:
        """Find nobody any more. Repeatable."""
        self._members = {}

    def meet(self, others: Sequence[Member]) -> None:
        """These are the other members now."""
        if self._tier is None:
            return
        found: dict[Address, Member] = {}
        for one in others:
            if one.peers and (address := self._address(one)) is not None:
                found[address] = one
        self._members = dict(list(found.items())[:MAX_PEERS])
        self._tier.meet(list(self._members))

    def _address(self, member: Member) -> Address | None:
        """Where a member answers; None if nothing of this node may go there."""
        try:
            address = Address.parse(member.peers)
            self._network.check_way(address, "peer.nodes")
            return address
        except (ValueError, ConfigError) as error:
            if member.peers not in self._refused:
                self._refused.add(member.peers)
                logger.warning("the fleet's node %s is no peer: %s", member.name, error)
            return None

    def _find(self, objects: Sequence[tuple[bytes, int]]) -> set[Address]:
        """Who holds any of these objects, by key and part, in host memory; blocks."""
        members = self._members
        try:
            found = holdings.holders(self._registry, objects, "host", members.values())
        except TierUnavailable:
            return set()
        names = {one.name for one in found}
        return {address for address, one in members.items() if one.name in names}
