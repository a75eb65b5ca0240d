"""The tiers that a configuration may name.

A new one is a part in `owned.py`, or in a file of its own, and a word here.
"""

from __future__ import annotations

from kvstrata.config.mooncake import MooncakeConfig
from kvstrata.config.network import PeerConfig
from kvstrata.config.object_store import ObjectStoreConfig
from kvstrata.config.owned import DiskConfig, MemoryConfig
from kvstrata.config.redis import RedisConfig
from kvstrata.config.tierparts import TierPart

TIERS: tuple[type[TierPart], ...] = (
    MemoryConfig,
    DiskConfig,
    PeerConfig,
    RedisConfig,
    MooncakeConfig,
    ObjectStoreConfig,
)
"""Every kind of tier, fastest first."""
