"""SGLang's storage interface (HiCache), answered by a node: nothing raises, nothing waits long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.version import __version__ as sglang_version

from kvstrata.config import load_config
from kvstrata.connectors.sglang.lookups import Wanted
from kvstrata.connectors.sglang.pages import KV
from kvstrata.connectors.sglang.plugin import missing
from kvstrata.connectors.sglang.session import Session
from kvstrata.errors import KVStrataError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.5.23",)
OURS = "kvstrata"
"""Under which name KVStrata's options stand in SGLang's extra configuration."""

T = TypeVar("T")


class KVStrataStorage(HiCacheStorage):
    """Keeps SGLang's KV in a KVStrata node; ``docs/sglang.md`` says how to use it.

    SGLang makes one in each rank's scheduler. When an engine is one that KVStrata does not cache,
    it says so once in the log and the engine runs as if there were no storage.

    Args:
        storage_config: ranks, and the operator's extra configuration.
        kwargs: what SGLang gives besides; nothing of it is used.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        self._session: Session | None = None
        self._told: set[str] = set()
        try:
            self._begin(storage_config)
        except KVStrataError as error:
            self._leave_uncached(str(error))
        except Exception as error:
            logger.exception("KVStrata: its start failed")
            self._leave_uncached(repr(error))

    def _begin(self, storage_config: HiCacheStorageConfig) -> None:
        extra = storage_config.extra_config or {}
        config = load_config(overrides=extra.get(OURS) or {})
        _log_as_sglang_does(config.log)
        if sglang_version not in TESTED_VERSIONS:
            logger.warning(
                "KVStrata was tested with SGLang %s, not with %s; its self-test at start decides "
                "whether the KV's bytes are understood",
                ", ".join(TESTED_VERSIONS), sglang_version,
            )  # fmt: skip
        if why := missing():
            self._leave_uncached(why)
            return
        if storage_config.attn_cp_size > 1:
            self._leave_uncached("context parallelism spreads a page over ranks")
            return
        from sglang.srt.runtime_context import get_server_args

        self._session = Session(config, get_server_args(), storage_config)

    # what SGLang has

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._take_in(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._take_in(host_pool, str(host_pool_name))

    def on_host_pools_registered(self) -> None:
        if self._session is not None:
            self._safely(self._session.ready, None, "its start")

    def _take_in(self, pool: Any, name: str) -> None:
        session = self._session
        if session is not None:
            self._safely(lambda: session.register(pool, name), None, "looking at a pool")
            for problem in session.problems:
                if problem not in self._told:
                    self._told.add(problem)
                    logger.warning("KVStrata leaves this engine's KV uncached: %s", problem)

    # pages of the one pool that all have

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        return self._ask(lambda session: session.prefix(keys, _before(extra_info), [Wanted(KV)]), 0)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        count = self._ask(lambda session: session.read(KV, keys, host_indices), 0)
        return _leading(count, len(keys))

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._write(KV, _before(extra_info), keys, host_indices)

    # pages of several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        wanted = [Wanted(KV)]
        for transfer in pool_transfers or ():
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # never gates a hit
            last = 0
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                last = max(1, len(transfer.keys or ()))
            wanted.append(Wanted(str(transfer.name), last))
        names = {str(transfer.name): transfer.name for transfer in pool_transfers or ()}
        nothing: tuple[int, list[int]] = (0, [])
        count, good = self._ask(
            lambda session: session.boundaries(keys, _before(extra_info), wanted), nothing
        )
        hits = {names.get(one.name, one.name): count for one in wanted} if count else {}
        return PoolTransferResult(count, hits, good)

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {one.name: self._read(one) for one in transfers}

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        before = _before(extra_info)
        return {
            one.name: self._write(str(one.name), before, one.keys or [], one.host_indices)
            for one in transfers
        }

    def _read(self, transfer: PoolTransfer) -> list[bool]:
        keys, indices = list(transfer.keys or ()), transfer.host_indices
        count = self._ask(lambda session: session.read(str(transfer.name), keys, indices), 0)
        return _leading(count, len(keys))

    def _write(
        self, name: str, before: Sequence[str], keys: list[str], indices: torch.Tensor | None
    ) -> list[bool]:
        if self._session is None:
            return [True] * len(keys)  # so that SGLang does not complain of each
        nothing = [False] * len(keys)
        return self._ask(lambda session: session.write(name, before, keys, indices), nothing)

    # the rest of the interface

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Single pages by value are not kept: set ``interface_v1`` to 1."""
        self._say_once("set interface_v1 to 1 in --hicache-storage-backend-extra-config")

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        self.get("")
        return [None] * len(keys)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        self.get(key)
        return False

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        self.get("")
        return False

    def clear(self) -> None:
        """Nothing: an engine does not empty what others share; ``kvstrata clear`` does."""
        self._say_once("SGLang asked to clear its storage; use `kvstrata clear`")

    def get_stats(self) -> Any:
        return self._safely(self._session.stats, None, "its metrics") if self._session else None

    def close(self) -> None:
        if self._session is not None:
            self._safely(self._session.close, None, "its end")

    # how

    def _ask(self, what: Callable[[Session], T], nothing: T) -> T:
        session = self._session
        return nothing if session is None else self._safely(lambda: what(session), nothing, "it")

    def _safely(self, what: Callable[[], T], nothing: T, name: str) -> T:
        """What it answers; ``nothing`` where it fails, for a cache can only be missed."""
        try:
            return what()
        except KVStrataError as error:
            logger.info("KVStrata: a miss: %s", error)
        except Exception:
            logger.exception("KVStrata: %s died of a bug", name)
        return nothing

    def _leave_uncached(self, why: str) -> None:
        logger.error("KVStrata leaves this engine's KV uncached: %s", why)

    def _say_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("KVStrata: %s", what)


def _before(extra_info: HiCacheStorageExtraInfo | None) -> Sequence[str]:
    """Hashes of the pages before those of a call."""
    return (extra_info.prefix_keys if extra_info is not None else None) or ()


def _leading(count: int, total: int) -> list[bool]:
    return [True] * count + [False] * (total - count)


def _log_as_sglang_does(level: str) -> None:
    """SGLang configures the root logger; what ours lets through goes there."""
    logging.getLogger("kvstrata").setLevel(level.upper())
