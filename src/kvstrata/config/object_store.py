"""The tier in an object store: its options, and how it is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata import units
from kvstrata.config import kinds
from kvstrata.config.parts import about, option
from kvstrata.config.shared import SharedPart
from kvstrata.config.tierparts import Room
from kvstrata.errors import ConfigError, TierUnavailable

if TYPE_CHECKING:
    from kvstrata.tiers.base import SharedTier

THE_STORES = "the store's"
AUTO = "auto"

_URL = re.compile(r"(?:(?:s3|gs|az)://[^/@?#\s]+(?:/[^?#\s]*)?|file:///[^?#\s]+)")
_ENDPOINT = re.compile(r"https?://[^@?#\s]+")
_REGION = re.compile(r"[a-z0-9-]{1,64}")


def _url(value: Any) -> str:
    if not isinstance(value, str) or not _URL.fullmatch(value):
        raise ValueError(f"{value!r} is no such URL")
    return value


def _capacity(value: Any) -> int | None:
    return None if value == THE_STORES else int(kinds.SIZE.parse(value))


def _format_capacity(value: int | None) -> str:
    return THE_STORES if value is None else units.format_size(value)


def _or_auto(pattern: re.Pattern[str], what: str, expected: str) -> kinds.Kind:
    def parse(value: Any) -> str | None:
        if value == AUTO:
            return None
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is no {what}")
        return value

    return kinds.Kind(parse, lambda value: value or AUTO, f'"auto", or {expected}')


URL = kinds.Kind(
    _url, str, 'a URL such as "s3://bucket/prefix", gs://, az:// or "file:///mnt/shared/kvstrata"'
)
CAPACITY = kinds.Kind(
    _capacity, _format_capacity, f'a size of at least 1MiB, such as "10TiB", or "{THE_STORES}"'
)
ENDPOINT = _or_auto(_ENDPOINT, "endpoint", 'a URL such as "http://10.0.0.1:9000"')
REGION = _or_auto(_REGION, "region", 'a region such as "eu-central-1"')


@dataclass(frozen=True, kw_only=True)
class ObjectStoreConfig(SharedPart):
    """A tier in S3, GCS, Azure or a shared folder; off unless `url` and `capacity` are given."""

    name: ClassVar[str] = "object_store"
    url: str = field(
        metadata=about(
            URL,
            None,
            "Where the objects lie: a bucket and a prefix in it, or a folder that all machines "
            "mount. Nodes that share have the same.",
            True,
        )
    )
    capacity: int | None = field(
        metadata=about(
            CAPACITY,
            None,
            "Bytes that the fleet keeps the store to, softly: one of the nodes removes what was "
            f"used longest ago. `{THE_STORES}`: nobody does, the store's own lifecycle rules do.",
            True,
        )
    )
    endpoint: str | None = option(
        ENDPOINT,
        AUTO,
        "Of a store that speaks S3, such as MinIO, Ceph or SeaweedFS. `auto`: AWS's own, or what "
        "`AWS_ENDPOINT` says.",
        shared=True,
    )
    region: str | None = option(
        REGION, AUTO, "Of an S3 bucket. `auto`: what `AWS_REGION` says, or us-east-1.", shared=True
    )

    def check(self, room: Room) -> None:
        super().check(room)
        for name in ("endpoint", "region"):
            if getattr(self, name) is not None and not self.url.startswith("s3:"):
                raise ConfigError(
                    f"object_store.{name}",
                    f"is for s3:// alone, and object_store.url is {self.url}",
                )

    def open(self, config: Any) -> SharedTier:
        try:
            from kvstrata.tiers.object_store.tier import ObjectStoreTier
        except ModuleNotFoundError as error:
            raise TierUnavailable(
                f"it needs the library {error.name}: pip install 'kvstrata[s3]'"
            ) from error
        return ObjectStoreTier(
            self.url,
            capacity_bytes=self.capacity,
            lasts_s=self.epoch_every,
            endpoint=self.endpoint,
            region=self.region,
        )
