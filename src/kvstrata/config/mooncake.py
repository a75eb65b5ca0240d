"""The tier in Mooncake Store: its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.parts import about, option
from kvstrata.config.shared import NAME, PREFIX, SharedPart
from kvstrata.config.tierparts import Room, check_fits
from kvstrata.tiers.mooncake.settings import EXPECTED, Master, Settings, parse_master

if TYPE_CHECKING:
    from kvstrata.tiers.base import SharedTier


def _lent(value: Any) -> int:
    none = value == "0" or (value == 0 and type(value) is int)
    return 0 if none else int(kinds.SIZE.parse(value))


MASTER = kinds.Kind(parse_master, str, EXPECTED)
LENT = kinds.Kind(
    _lent, lambda value: units.format_size(value) if value else 0, f"0, or {kinds.SIZE.expected}"
)
SWITCH = kinds.one_of(("off", "on"))


@dataclass(frozen=True, kw_only=True)
class MooncakeConfig(SharedPart):
    """The tier in Mooncake Store, which a fleet shares; off unless `master` is given."""

    name: ClassVar[str] = "mooncake"
    master: Master = field(
        metadata=about(MASTER, None, "Where Mooncake's master listens (`-rpc_port`).", True)
    )
    metadata: str = option(
        kinds.TEXT,
        "P2PHANDSHAKE",
        "The metadata server, such as `http://10.0.0.1:8080/metadata`; the default needs none, for "
        "clients ask one another. All clients of a master have the same.",
        shared=True,
    )
    protocol: str = option(
        kinds.one_of(("tcp", "rdma")), "tcp", "How bytes go from machine to machine.", shared=True
    )
    device: str = option(
        kinds.TEXT, "auto", "Network cards of `rdma`, such as `mlx5_0,mlx5_1`.", shared=True
    )
    segment: int = option(
        LENT, "0", "Memory of this machine that the store may use; 0: none.", shared=True
    )
    buffer: int = option(
        kinds.SIZE,
        "64MiB",
        "Of `rdma`: registered memory beside the pool, through which encoded objects and headers "
        "go; as much as `io_threads` objects at least.",
        shared=True,
    )
    replicas: int = option(
        kinds.whole(1, 8), "1", "Copies of each object, on as many machines.", shared=True
    )
    soft_pin: str = option(
        SWITCH, "off", "Whether Mooncake evicts objects after all that are not pinned.", shared=True
    )
    prefix: str = option(NAME, "kvstrata", PREFIX, shared=True)

    @property
    def host_bytes(self) -> int:
        return self.segment

    def check(self, room: Room) -> None:
        super().check(room)
        where = "memory this machine has beside host.capacity"
        check_fits("mooncake.segment", self.segment, room.memory_bytes(), where)

    def open(self, config: Any) -> SharedTier:
        from kvstrata.tiers.mooncake.client import Client
        from kvstrata.tiers.mooncake.tier import MooncakeTier

        settings = Settings(
            master=self.master,
            metadata=self.metadata,
            protocol=self.protocol,
            device="" if self.device == "auto" else self.device,
            segment_bytes=self.segment,
            buffer_bytes=self.buffer,
            replicas=self.replicas,
            soft_pin=self.soft_pin == "on",
        )
        return MooncakeTier(Client(settings), self.prefix, self.epoch_every)
