"""SGLang's own kit over our storage: its real tree, controller, pools and threads; no engine."""

from __future__ import annotations

import json
import random
import time
import unittest
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import sglang.srt.managers.scheduler  # noqa: F401  (the plugin hooks only what is imported)
import sglang.test.kits.unified_radix_cache.fixtures as fixtures
import torch
from sglang.kernels.ops.attention.fla.chunk_delta_h import CHUNK_SIZE
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from kvstrata.connectors.sglang import KVStrataStorage
from kvstrata.testing.sglang import CONNECTOR

FULL, SWA, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA

load_plugins()


@dataclass(frozen=True)
class Kind(CacheConfig):
    """The kit's configuration of a cache, and what it has none for: a latent (MLA)."""

    latent: bool = False


def kind(name: str, page_tokens: int, **more: Any) -> Kind:
    """A small cache of one kind: ``full``, ``swa``, ``mamba`` or ``mla``."""
    small: dict[str, Any] = {
        "page_size": page_tokens,
        "num_layers": 6,
        "full_attention_layer_ids": (1, 3, 5),
        "kv_size": 16 * page_tokens,
        "max_context_len": 16 * page_tokens,
        "head_dim": 32,
    }
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "mla": {"latent": True},
        "swa": {"components": (FULL, SWA), "sliding_window_size": 2 * page_tokens},
        "mamba": {
            "components": (FULL, MAMBA),
            "enable_mamba_extra_buffer": True,
            "mamba_cache_size": 60,
        },
    }
    return Kind(**{**small, **kinds[name], **more})


class Cache:
    """A cache as a scheduler has it, on the device's side and on the host's.

    Args:
        kit: whose it is.
        parts: what the kit has built: tree, allocator, table of requests.
    """

    def __init__(self, kit: Kit, parts: tuple[Any, Any, Any]) -> None:
        self._kit = kit
        self.tree, self.allocator, self.table = parts

    @property
    def storage(self) -> Any:
        """Our storage."""
        return self.tree.cache_controller.storage_backend

    def storage_of(self, rank: int, ranks: int) -> Any:
        """Another storage of the same pool, of a rank of so many; it is closed with the kit."""
        config = self.tree.cache_controller.storage_config
        made = KVStrataStorage(replace(config, tp_rank=rank, tp_size=ranks))
        self._kit.addCleanup(made.close)
        made.register_mem_pool_host(self.pool)
        made.on_host_pools_registered()
        return made

    @property
    def pool(self) -> Any:
        """The host's pool of keys and values."""
        return self.tree.cache_controller.mem_pool_host.anchor_entry.host_pool

    def hashes(self, tokens: Sequence[int]) -> list[str]:
        """SGLang's hashes of a prompt's whole pages."""
        size = self._kit.cfg.page_size
        whole = len(tokens) // size * size
        return list(get_storage_hash_str(list(tokens[:whole]), None, page_size=size))

    def keys(self, hashes: Sequence[str]) -> list[bytes]:
        """What the node calls these pages."""
        session = self.storage._session
        with session._attachment.client() as client:
            digest = session._names.digest(session._names.generation.name)
            return list(session._names.keys(client.hello.secret, digest, hashes))

    def host_pages(self, count: int, first: int = 0) -> torch.Tensor:
        """Indices of pages of the host's pool, taken from nobody."""
        size = self._kit.cfg.page_size
        return torch.arange(first * size, (first + count) * size)

    def host_bytes(self, indices: torch.Tensor) -> torch.Tensor:
        """What the host's pool has there, (pages, bytes)."""
        starts = indices[:: self._kit.cfg.page_size].tolist()
        return torch.stack([_bytes(self.pool.get_data_page(at, flat=True)) for at in starts])

    def fill_host(self, seed: int) -> None:
        """Noise in the host's pool of keys and values."""
        generator = torch.Generator().manual_seed(seed)
        flat = self.pool.kv_buffer.view(torch.uint8)
        flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator))

    def fill(self, seed: int) -> None:
        """Noise in all that the device holds, special numbers among it."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self._tensors():
            flat = tensor.view(torch.uint8)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=generator))

    def insert(self, tokens: Sequence[int]) -> Any:
        """Have the device hold these tokens; the last node of their path."""
        self._kit._insert(self.tree, self.allocator, self.table, list(tokens))
        return fixtures.match_prefix(self.tree, list(tokens)).last_device_node

    def store(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        """Bring tokens to the storage; the bytes that the device has of them, by pool."""
        kit, leaf = self._kit, self.insert(tokens)
        if self.tree.buffer_pipeline is not None:
            kit._buffer_backup_and_wait(self.tree, leaf)
        else:
            kit._backup_node(self.tree, leaf)
            kit._write_path_to_l3(self.tree, leaf)
            kit._flush_l3_backups(self.tree)
        return self.held(leaf)

    def prefetch(self, tokens: Sequence[int]) -> int:
        """Have the storage asked, as a scheduler does, for what of a prompt is not here; tokens of
        the prompt that are here now."""
        request, tree = self._kit.request(), self.tree
        match = fixtures.match_prefix(tree, list(tokens))
        anchor, here = match.last_host_node, match.device_prefix_len + match.host_hit_length
        tree.prefetch_from_storage(
            request, anchor, array("q", tokens[here:]), tree.get_last_hash_value(anchor),
            tree.get_prefix_hash_values(anchor), matched_prefix_tokens=list(tokens[:here]),
        )  # fmt: skip
        self._kit._run_prefetch_to_completion(tree, request)
        match = fixtures.match_prefix(tree, list(tokens))
        return int(match.device_prefix_len + match.host_hit_length)

    def give_up(self, tokens: Sequence[int], asked: Callable[[], bool]) -> None:
        """Have the storage asked for a prompt whose request ends as soon as it was."""
        request, tree = self._kit.request(), self.tree
        tree.prefetch_from_storage(request, tree.root_node_handle(), array("q", tokens))
        while not asked():
            time.sleep(0.0002)
        tree.release_aborted_request(request)
        tree.check_hicache_events()

    def loaded(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        """The bytes of a prompt that was prefetched, once they are on the device."""
        match = fixtures.match_prefix(self.tree, list(tokens))
        if self.tree.buffer_pipeline is None:
            node = match.last_host_node
            self._kit._load_back_node(self.tree, node, self._request_of(match))
            return self.held(node)
        return self.held(match.last_device_node)

    def held(self, leaf: Any) -> dict[str, torch.Tensor]:
        """The bytes that the device has of a path, by pool, as far as its kind needs them."""
        indices = self.tree.path_device_indices(leaf)
        kinds = self._kit.cfg
        found = {"kv": _rows(_attention(self._kv), indices)}
        if kinds.has_swa:
            window = indices[-kinds.sliding_window_size :]
            there = self.allocator.full_to_swa_index_mapping[window]
            assert (there > 0).all()
            found["swa"] = _rows(_attention(self.allocator.get_kvcache().swa_kv_pool), there)
        if kinds.has_mamba:
            at = fixtures.node_device_value(self.tree, leaf, MAMBA)
            assert at is not None
            found["mamba"] = torch.cat([_bytes(one[:, at.reshape(-1)]) for one in self._states()])
        return found

    def _request_of(self, match: Any) -> Any:
        if not self._kit.cfg.has_mamba:
            return None
        request = self._kit._make_req(self.table)
        self._kit._apply_match_to_req(request, match)
        return request

    @property
    def _kv(self) -> Any:
        return self._kit._get_full_kv_pool(self.allocator)

    def _states(self) -> list[torch.Tensor]:
        states = self.table.mamba_pool.mamba_cache
        return [states.temporal, *states.conv]

    def _tensors(self) -> list[torch.Tensor]:
        tensors = _attention(self._kv)
        if self._kit.cfg.has_swa:
            tensors += _attention(self.allocator.get_kvcache().swa_kv_pool)
        if self._kit.cfg.has_mamba:
            tensors += self._states()
        return tensors


class Kit(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """What builds caches with our storage behind them; `doCleanups` ends them.

    Args:
        kind: of cache.
        model: folder of a model, for its identity.
        settings: KVStrata's options.
        layout: of host pools.
        buffered: their mode: ``buffer_only``, or ``cache``.
        prefetch: SGLang's policy.
    """

    __test__ = False

    def __init__(
        self,
        kind: Kind,
        model: Path,
        settings: Mapping[str, Any],
        layout: str = "page_first_direct",
        buffered: bool = False,
        prefetch: str = "wait_complete",
    ) -> None:
        super().__init__("runTest")
        self.cfg = kind
        self._model = model
        self._settings = settings
        self._layout = layout
        self._buffered = buffered
        self._prefetch = prefetch
        self._requests = 0

    def runTest(self) -> None:
        """Nothing: others call it."""

    def request(self) -> Any:
        """Another request's name."""
        self._requests += 1
        return CacheRequestHandle(f"r{self._requests}-{id(self)}", 0)

    def cache(self, seed: int = 0) -> Cache:
        """A cache of its own, its device full of noise."""
        parts = self._built()
        self._init_hicache(parts[0])
        made = Cache(self, parts)
        made.fill(seed)
        return made

    def tokens(self, pages: int, seed: int = 0, more: int = 0) -> list[int]:
        """Tokens of so many whole pages, and some more."""
        rng = random.Random(seed)
        return [rng.randrange(1, 1 << 20) for _ in range(pages * self.cfg.page_size + more)]

    def _built(self) -> tuple[Any, Any, Any]:
        if not self.cfg.latent:
            return fixtures.build_fixture(self.cfg)  # type: ignore[no-any-return]

        def latent(**options: Any) -> Any:
            for name in ("head_num", "head_dim"):
                del options[name]
            return MLATokenToKVPool(kv_lora_rank=48, qk_rope_head_dim=16, **options)

        with mock.patch.object(fixtures, "MHATokenToKVPool", latent):
            return fixtures.build_fixture(self.cfg)  # type: ignore[no-any-return]

    def _init_hicache(self, cache: Any, **options: Any) -> None:
        place = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        place.__enter__()
        self.addCleanup(place.__exit__, None, None, None)
        extra = {**CONNECTOR, "prefetch_threshold": 1, "kvstrata": dict(self._settings)}
        arguments = ServerArgs(
            model_path=str(self._model),
            page_size=self.cfg.page_size,
            # On a CPU there are the copies of two layouts; of the third there is the pool alone.
            hicache_io_backend="kernel" if self._layout == "page_first" else "direct",
            hicache_mem_layout=self._layout,
            hicache_write_policy="write_through",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(extra),
            hicache_storage_prefetch_policy=self._prefetch,
            hicache_host_memory_mode="buffer_only" if self._buffered else "cache",
        )
        arguments._mamba_cache_chunk_size = max(CHUNK_SIZE, self.cfg.page_size)
        set_global_server_args_for_scheduler(arguments)
        cache.init_hicache(arguments, cache.cache_init_params)
        self.addCleanup(fixtures.drop_hicache_atexit_pin, cache)
        self.addCleanup(cache.release_host_resources)
        cache.write_through_threshold = 1 << 30
        cache.load_back_threshold = 0
        controller = cache.cache_controller
        # Host and device are of one size here, which would leave prefetches no room.
        controller.prefetch_capacity_limit = max(
            controller.prefetch_capacity_limit, controller.mem_pool_host.size
        )
        self.addCleanup(controller.storage_backend.close)
        self.addCleanup(controller._stop_storage_threads)


def _attention(pool: Any) -> list[torch.Tensor]:
    """The device's tensors of a pool, rows by token."""
    if hasattr(pool, "k_buffer"):
        return [*pool.k_buffer, *pool.v_buffer]
    return list(pool.kv_buffer)


def _rows(tensors: Sequence[torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
    """Bytes of tokens, (tokens, bytes of one)."""
    return torch.cat([_bytes(one[indices]).reshape(len(indices), -1) for one in tensors], 1)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()
