"""How large the pool in host memory is."""

from __future__ import annotations

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.options import Config
from kvstrata.errors import ConfigError


def host_capacity_bytes(config: Config, available_bytes: int) -> int:
    """Size of the pool in bytes, a multiple of 4096.

    Args:
        available_bytes: memory that can be taken now; a share is a share of this, less what the
            tier of encoded objects may take.
    Raises:
        ConfigError: that leaves nothing.
    """
    capacity = config.host.capacity
    encoded = sum(part.host_bytes for part in config.tiers)
    left = max(available_bytes - encoded, 0)
    wanted = capacity if isinstance(capacity, int) else int(capacity * left)
    if wanted < kinds.MIN_CAPACITY and encoded:
        size, have = units.format_size(encoded), units.approximate_size(available_bytes)
        raise ConfigError("memory.capacity", f"{size} of {have} leaves nothing for the pool")
    return wanted // 4096 * 4096
