"""The tier in Redis: its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata.config import kinds
from kvstrata.config.parts import about, option
from kvstrata.config.shared import NAME, PREFIX, SharedPart
from kvstrata.errors import ConfigError
from kvstrata.tiers.redis.address import EXPECTED, Address, parse_address

if TYPE_CHECKING:
    from kvstrata.tiers.base import SharedTier

URL = kinds.Kind(parse_address, lambda address: str(address.url), EXPECTED, str)


@dataclass(frozen=True, kw_only=True)
class RedisConfig(SharedPart):
    """The tier in Redis or Valkey, which a fleet shares; off unless `url` is given."""

    name: ClassVar[str] = "redis"
    url: Address = field(
        metadata=about(
            URL,
            None,
            "Where it is, and as whom to talk to it; docs/redis.md has all that it may say. The "
            "password is never printed.",
            True,
        )
    )
    prefix: str = option(NAME, "kvstrata", PREFIX, shared=True)
    ttl: float = option(
        kinds.DURATION,
        "0s",
        "How long an object stays that nobody uses; 0: until Redis evicts it.",
        shared=True,
    )

    def open(self, config: Any) -> SharedTier:
        try:
            from kvstrata.tiers.redis.tier import RedisTier
        except ModuleNotFoundError as error:
            raise ConfigError(
                "redis", f"its client is missing ({error}); pip install 'kvstrata[redis]'"
            ) from error
        return RedisTier(self.url, self.prefix, lasts_s=self.epoch_every, ttl_s=self.ttl)
