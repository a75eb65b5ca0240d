"""One strict configuration for nodes, clients and commands: `load_config` makes it."""

from kvstrata.config.environment import OTHER_VARIABLES
from kvstrata.config.loading import load_config
from kvstrata.config.options import (
    MAY_BE_MISSING,
    OPTIONS,
    PARTS,
    Config,
    Option,
    default_secret_file,
    differing,
    effective,
)
from kvstrata.config.owned import DiskConfig, MemoryConfig
from kvstrata.config.parts import DeadlineConfig, HostConfig, LeaseConfig, PinConfig
from kvstrata.config.pool import host_capacity_bytes
from kvstrata.config.redis import RedisConfig
from kvstrata.config.tierparts import TierPart
from kvstrata.config.tiers import TIERS

__all__ = [
    "MAY_BE_MISSING",
    "OPTIONS",
    "OTHER_VARIABLES",
    "PARTS",
    "TIERS",
    "Config",
    "DeadlineConfig",
    "DiskConfig",
    "HostConfig",
    "LeaseConfig",
    "MemoryConfig",
    "Option",
    "PinConfig",
    "RedisConfig",
    "TierPart",
    "default_secret_file",
    "differing",
    "effective",
    "host_capacity_bytes",
    "load_config",
]
