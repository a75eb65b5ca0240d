"""One strict configuration for nodes, clients and commands: `load_config` makes it."""

from kvstrata.config.options import (
    MAY_BE_MISSING,
    OPTIONS,
    OTHER_VARIABLES,
    PARTS,
    Config,
    DeadlineConfig,
    DiskConfig,
    HostConfig,
    LeaseConfig,
    MemoryConfig,
    Option,
    default_secret_file,
    effective,
    file_system_bytes,
    host_capacity_bytes,
    load_config,
)

__all__ = [
    "MAY_BE_MISSING",
    "OPTIONS",
    "OTHER_VARIABLES",
    "PARTS",
    "Config",
    "DeadlineConfig",
    "DiskConfig",
    "HostConfig",
    "LeaseConfig",
    "MemoryConfig",
    "Option",
    "default_secret_file",
    "effective",
    "file_system_bytes",
    "host_capacity_bytes",
    "load_config",
]
