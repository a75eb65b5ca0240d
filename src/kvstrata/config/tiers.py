"""The tiers that a configuration may name.

A new one is a part in `owned.py` or `shared.py`, and a word here.
"""

from __future__ import annotations

from kvstrata.config.network import PeerConfig
from kvstrata.config.owned import DiskConfig, MemoryConfig
from kvstrata.config.tierparts import TierPart

TIERS: tuple[type[TierPart], ...] = (MemoryConfig, DiskConfig, PeerConfig)
"""Every kind of tier, fastest first."""
