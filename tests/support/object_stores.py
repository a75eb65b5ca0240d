"""Object stores for tests: a tier in SeaweedFS's bucket, and who is let in."""

from __future__ import annotations

import pytest

from kvstrata.testing.servers.seaweedfs import BUCKET, KEY, SECRET
from kvstrata.tiers.object_store.tier import ObjectStoreTier

TIMEOUT_S = 6.0
"""Of a call; of those who write one object on a condition SeaweedFS lets some wait for seconds."""
SHORT_S = 3.0
"""Where nobody answers."""


def let_in(monkeypatch: pytest.MonkeyPatch, key: str = KEY, secret: str = SECRET) -> None:
    """Have the credentials of one of SeaweedFS's identities, and reach it past any proxy."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def in_s3(
    endpoint: str,
    place: str = "",
    bucket: str = BUCKET,
    timeout_s: float = TIMEOUT_S,
    capacity_bytes: int | None = 1 << 40,
) -> ObjectStoreTier:
    """A tier under a prefix of the bucket, with a budget that no test reaches."""
    return ObjectStoreTier(
        f"s3://{bucket}/{place}",
        capacity_bytes=capacity_bytes,
        endpoint=endpoint,
        timeout_s=timeout_s,
    )
