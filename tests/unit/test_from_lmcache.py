"""The page for those who come from LMCache: whole on their side, and true on ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from kvstrata import cli
from kvstrata.config import OPTIONS, OTHER_VARIABLES
from kvstrata.config.kinds import HINTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-lmcache.md").read_text(encoding="utf-8")
PATHS = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

# Every option of LMCacheEngineConfig in LMCache 0.5.6, as its lmcache/v1/config.py lists them.
NAMES = """
chunk_size local_cpu max_local_cpu_size local_cpu_use_hugepages reserve_local_cpu_size local_disk
local_disk_path_sharding max_local_disk_size remote_url remote_serde use_layerwise
save_decode_cache pre_caching_hash_algorithm enable_blending blend_recompute_ratios
blend_thresholds blend_check_layers blend_min_tokens blend_special_str retrieve_locations
store_location enable_p2p p2p_host p2p_init_ports p2p_lookup_ports mp_host mp_port
enable_controller lmcache_instance_id controller_pull_url controller_reply_url
lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time
lmcache_worker_heartbeat_time enable_pd pd_role pd_buffer_size pd_buffer_device pd_peer_host
pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host pd_proxy_port
pd_allocation_timeout_sec pd_shutdown_timeout_sec pd_condition_poll_interval_sec
pd_max_prefill_len pd_backend_mode pd_skip_proxy_notification pd_bidirectional transfer_channel
nixl_backends nixl_buffer_size nixl_buffer_device gds_path gds_path_sharding gds_buffer_size
maru_path maru_pool_size use_gds gds_backend audit_actual_remote_url internal_api_server_host
extra_config save_unfull_chunk blocking_timeout_secs external_lookup_client py_enable_gc
cache_policy numa_mode enable_async_loading internal_api_server_enabled
internal_api_server_port_start priority_limit internal_api_server_include_index_list
internal_api_server_socket_path_prefix runtime_plugin_locations storage_plugins
remote_storage_plugins lookup_timeout_ms min_retrieve_tokens hit_miss_ratio
lookup_server_worker_ids enable_scheduler_bypass_lookup script_allowed_imports
run_script_api_enabled enable_lazy_memory_allocator lazy_memory_initial_ratio
lazy_memory_expand_trigger_ratio lazy_memory_step_ratio lazy_memory_safe_size
enable_chunk_statistics chunk_statistics_auto_start_statistics
chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks
chunk_statistics_strategy enable_kv_events use_gpu_connector_v3 pin_timeout_sec
pin_check_interval_sec remote_config_url app_id enable_hidden_state_cache
max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode
"""
THEIRS = NAMES.split()


def rows() -> list[list[str]]:
    """The cells of every table below the first hour: theirs, ours, remarks."""
    compared = PAGE.partition("\n## Options, one by one\n")[2]
    lines = re.findall(r"^\|(.+)\|$", compared, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def quoted(column: int) -> list[str]:
    return [word for row in rows() for word in re.findall(r"`([^`]+)`", row[column])]


def commands() -> dict[str, set[str]]:
    """Each command, those of groups too, with the options that it takes."""
    found: dict[str, set[str]] = {}

    def walk(name: str, command: Any) -> None:
        found[name] = {spelling for option in command.params for spelling in option.opts}
        for sub, child in getattr(command, "commands", {}).items():
            walk(f"{name} {sub}", child)

    walk("kvstrata", typer.main.get_command(cli.build_app()))
    return found


def test_each_of_their_options_has_a_row() -> None:
    assert sorted(set(THEIRS) - set(quoted(0))) == []
    assert len(THEIRS) == 108


def test_a_row_says_what_is_here_or_why_nothing_is() -> None:
    assert len(rows()) > 80
    for row in rows():
        assert len(row) == 3, row
        _, ours, remark = row
        if not ours:
            assert re.match(r"not needed|not there", remark), row


@pytest.mark.parametrize("name", sorted(set(quoted(1))))
def test_what_it_names_here_exists(name: str) -> None:
    if name.startswith("kvstrata"):
        known, words = commands(), name.split()
        command = " ".join(words[:3]) if " ".join(words[:3]) in known else " ".join(words[:2])
        assert command in known
        assert {word for word in words if word.startswith("--")} <= known[command]
    elif name.startswith("{"):
        assert set(json.loads(name)) <= set(HINTS)
    elif " /" in name:
        assert f"### `{name}`" in PATHS
    elif name.isupper():
        assert name in OTHER_VARIABLES
    else:
        assert name in OPTIONS


def test_options_that_remarks_name_exist() -> None:
    parts = {path.partition(".")[0] for path in OPTIONS if "." in path}
    named = {
        word
        for word in re.findall(r"`([a-z_]+\.[a-z_]+)`", PAGE)
        if word.partition(".")[0] in parts
    }
    assert named > {"memory.policy", "disk.codec", "api.token_file"}
    assert named <= set(OPTIONS)
