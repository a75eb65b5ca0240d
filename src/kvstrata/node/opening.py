"""The slower tiers that a configuration names, opened, each with its threads, codec and keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstrata.config import Config
from kvstrata.config.network import PeerConfig
from kvstrata.config.owned import OwnedPart
from kvstrata.config.shared import SharedPart
from kvstrata.config.tierparts import TierPart
from kvstrata.errors import ConfigError, KVStrataError, TierUnavailable
from kvstrata.node.coding.auto import Auto, Tables
from kvstrata.node.coding.choosing import Always, Choice, Exact
from kvstrata.node.coding.key_source import read_keys
from kvstrata.node.coding.recoding import NO_CODEC, warm_up
from kvstrata.node.common.background import report_bug
from kvstrata.node.service.backing import Backing
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.service.shared import SharedBacking
from kvstrata.observe.counters import Counters
from kvstrata.policies import create_policy
from kvstrata.quality.bound import Bound
from kvstrata.quality.table import cache_folder
from kvstrata.tiers.base import OwnedTier, SharedTier
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer.borrowing import Nixl
from kvstrata.transfer.nixl import Memory
from kvstrata.transfer.peers import NIXL

if TYPE_CHECKING:
    from kvstrata.codecs import Codec
    from kvstrata.node.coding.sealing import KeyRing

logger = logging.getLogger(__name__)


def open_backings(
    config: Config, pool: memoryview, counters: Counters, clock: Callable[[], float]
) -> tuple[list[Backing], dict[str, str], Nixl | None]:
    """The slower tiers, fastest first, why those that cannot be opened are left out, and NIXL."""
    backings: list[Backing] = []
    left_out: dict[str, str] = {}
    nixl = _nixl(config, pool, left_out)
    bound = Bound.parse(config.quality) if config.quality != "none" else Bound(())
    tables = Tables(bound, cache_folder() / "quality", clock)
    for part in config.tiers:
        try:
            # First what takes nothing that would have to be given back.
            choice = _choice(part.codec, part.name, tables)
            coarser = [Always(_ready(name)) for name in part.coarser]
            keys = _keys(part)
            tier = part.open(config)
            tier.bind(pool)
        except Exception as error:
            if not isinstance(error, KVStrataError):
                report_bug(counters, f"opening {part.name}", error)
            logger.error("the %s tier is off: %s", part.name, error)
            left_out[part.name] = str(error)
            counters.add("tiers_left_out_total", tier=part.name)
            continue
        if nixl is not None and isinstance(tier, PeerTier):
            tier.read_by(nixl.borrower)
        backing = _in_service(part, tier,
            num_threads=part.io_threads, queue_bytes=part.write_queue,
            deadline_s=config.deadlines.load, counters=counters, clock=clock,
            choice=choice, coarser=coarser, load_target_s=part.load_target,
            keys=keys,
        )  # fmt: skip
        backings.append(backing)
        if part.codec == "auto":
            tables.backings.append(backing)
    return backings, left_out, nixl


def _nixl(config: Config, pool: memoryview, left_out: dict[str, str]) -> Nixl | None:
    """NIXL for the pool, where it is configured; says why where it cannot be had."""
    if NIXL not in config.network.ways:
        return None
    try:
        return Nixl(Memory.of(pool))
    except TierUnavailable as error:
        logger.error("bytes of other nodes come over TCP: %s", error)
        left_out[NIXL] = str(error)
        return None


def _in_service(part: TierPart, tier: OwnedTier | SharedTier, **common: Any) -> Backing:
    if isinstance(part, PeerConfig):
        assert isinstance(tier, PeerTier)
        return PeerBacking(
            tier, why_not=part.why_not, lookup_timeout_s=part.lookup_timeout, **common
        )
    if isinstance(part, SharedPart):
        assert isinstance(tier, SharedTier)
        return SharedBacking(tier, lookup_timeout_s=part.lookup_timeout, **common)
    assert isinstance(part, OwnedPart)
    assert isinstance(tier, OwnedTier)
    policy = create_policy(part.policy, part.capacity, common["clock"])
    return OwnedBacking(tier, part.capacity, policy, scrub_bytes_per_s=part.scrub_rate, **common)


def _choice(codec: str, tier: str, tables: Tables) -> Choice | None:
    """How a tier stores; None for raw, which need not pay for importing numba."""
    if codec == "raw":
        return None
    if codec == "exact":
        return Exact()
    return Auto(tables, tier) if codec == "auto" else Always(_ready(codec))


def _ready(name: str) -> Codec:
    """The codec, compiled.

    Raises:
        TierUnavailable: it does not work on this machine.
    """
    try:
        from kvstrata.codecs import codec_named

        codec = codec_named(name)
        warm_up(codec)
    except NO_CODEC as error:
        raise TierUnavailable(f"the codec {name} does not work here: {error}") from error
    return codec


def _keys(part: TierPart) -> KeyRing | None:
    """What a tier encrypts with; None where it does not.

    Raises:
        ConfigError: it should, and cannot.
    """
    if part.encryption == "none":
        return None
    option = f"{part.name}.encryption"
    try:
        from kvstrata.node.coding.sealing import KeyRing
    except ImportError as error:
        raise ConfigError(
            option, f"needs cryptography 47 or later ({error}): pip install 'kvstrata[encryption]'"
        ) from error
    keys = KeyRing(read_keys(part.encryption, option))
    logger.info("%s: new objects are encrypted with the key %s; keys that open: %d",
                part.name, keys.ids[0].hex(), len(keys.ids))  # fmt: skip
    return keys
