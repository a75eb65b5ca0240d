"""Tiers in a real Redis, and what tests of them do more than once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from kvstrata.errors import TierUnavailable
from kvstrata.testing.shared import name
from kvstrata.testing.stores import HIT, MISS, PAGE, filled, has, put, read_one, write
from kvstrata.tiers.base import SharedTier
from kvstrata.tiers.marks import Mark
from kvstrata.tiers.redis.address import parse_address
from kvstrata.tiers.redis.tier import RedisTier


def tier_at(url: str, **options: float) -> RedisTier:
    return RedisTier(parse_address(url), "kvstrata", **{"timeout_s": 5.0, **options})  # type: ignore[arg-type]


def every_verb(tier: SharedTier) -> None:
    """Use all of a tier: in pieces, replaced, conditionally, and by epochs."""
    data, large = filled(PAGE, 1), filled(8 * PAGE, 2)
    tier.epoch()
    for one in (data, large):
        assert write(tier, [(name(1), one)]) == [HIT]
        assert tier.write([put(name(1), one, True)]) == [MISS]
        assert read_one(tier, name(1), 8 * PAGE) == (HIT, bytes(one))
        tier.touch([name(1)])
    assert has(tier, [name(1)]) == [HIT]
    tier.add_mark(Mark(bytes(16), b"", 1))
    tier.begin_epoch()
    assert tier.delete([name(1)]) == [HIT]
    write(tier, [(name(1), large)])
    assert tier.forget(1) == 1
    tier.upkeep()


def rule_on_the_page(password: str, user: str = "kvstrata") -> list[str]:
    """The command of docs/redis.md that makes such a user for the tier."""
    page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text(encoding="utf-8")
    (rule,) = re.findall(rf"^ACL SETUSER {user} .*$", page, re.MULTILINE)
    return str(rule).replace("PASSWORD", password).split()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if true():
                return
        except (redis.RedisError, TierUnavailable):
            pass
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def timed(verb: Callable[[], object]) -> float:
    """Seconds until a tier says that it is unavailable."""
    begun = time.monotonic()
    with pytest.raises(TierUnavailable):
        verb()
    return time.monotonic() - begun
