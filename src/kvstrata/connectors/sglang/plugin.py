"""The entry point ``sglang.srt.plugins``: hears of new weights; SGLang tells no storage of them."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from kvstrata.connectors.sglang.renewals import OF_THIS_PROCESS

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler"
_UPDATER = (
    "sglang.srt.managers.scheduler_components.weight_updater",
    "SchedulerWeightUpdaterManager",
)
UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)
"""SGLang's ways to exchange weights, in its scheduler's process and on each rank."""
RELEASE = "release_memory_occupation"
"""Its way to give memory back; weights of which there is no copy are lost by it."""


def register() -> None:
    """Hook into SGLang where weights come and change, and where it flushes; it calls this once."""
    if _SCHEDULER not in sys.modules:
        return  # a process without a storage
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for (*place, name), hook in _hooks().items():
        how = HookType.AFTER if hook in (_after_flush, _after_load) else HookType.AROUND
        HookRegistry.register(".".join((*place, name)), hook, how)


def missing() -> str:
    """What of SGLang is not hooked, in words; empty: all of it is.

    Without it an answer might come from KV of other weights, so nothing may be served.
    """
    for (module, owner, name), hook in _hooks().items():
        method = getattr(getattr(importlib.import_module(module), owner, None), name, None)
        if method is None:
            return f"this SGLang has no {owner}.{name}, so an update of weights may go unheard"
        if not _goes_through(method, hook):
            return (
                "its plugin is not active, so an update of weights would go unheard: install "
                "KVStrata with pip where SGLang is, and name kvstrata in SGLANG_PLUGINS if that "
                "is set"
            )
    return ""


def _hooks() -> dict[tuple[str, str, str], Callable[..., Any]]:
    """Modules, classes and methods of SGLang, and what each is hooked with."""
    module, owner = _UPDATER
    hooks: dict[tuple[str, str, str], Callable[..., Any]] = {
        (module, owner, name): _around_update for name in UPDATES
    }
    hooks[module, owner, RELEASE] = _around_release
    hooks[_SCHEDULER, "Scheduler", "flush_cache"] = _after_flush
    hooks[_SCHEDULER, "Scheduler", "init_model_worker"] = _after_load
    return hooks


def _goes_through(method: Any, hook: Callable[..., Any]) -> bool:
    """Whether a method is one that SGLang has wrapped in a hook, under whatever others wrap it."""
    while (inner := getattr(method, "__wrapped__", None)) is not None:
        # SGLang's wrapper calls the hook, so it closes over it.
        if any(_content(cell) is hook for cell in getattr(method, "__closure__", None) or ()):
            return True
        method = inner
    return False


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _around_update(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    OF_THIS_PROCESS.renew(_same_on_all_ranks(updater))
    return original(updater, *args, **kwargs)


def _around_release(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    request = args[0] if args else kwargs["recv_req"]
    if "weights" in (request.tags or ["weights"]) and _loses(updater):
        # What it computes before it is given weights again is nobody's, and no checkpoint's.
        OF_THIS_PROCESS.renew(_same_on_all_ranks(updater))
    return original(updater, *args, **kwargs)


def _loses(updater: Any) -> bool:
    """Whether weights that are released come back empty."""
    from sglang.srt.runtime_context import get_server_args

    kept = getattr(get_server_args(), "enable_weights_cpu_backup", False)
    return bool(updater.memory_saver_adapter.enabled) and not kept


def _after_flush(flushed: Any, *args: Any, **kwargs: Any) -> Any:
    if flushed:
        OF_THIS_PROCESS.flushed()
    return flushed


def _after_load(result: Any, *args: Any, **kwargs: Any) -> Any:
    OF_THIS_PROCESS.loaded_at = time.time_ns()
    return result


def _same_on_all_ranks(updater: Any) -> str:
    """A name for what the weights will be. SGLang updates all ranks in step."""
    import torch
    import torch.distributed as dist

    name = os.urandom(16)
    group = getattr(updater, "tp_cpu_group", None)
    if group is not None and dist.is_initialized() and dist.get_world_size(group) > 1:
        shared = torch.tensor(list(name), dtype=torch.uint8)
        dist.broadcast(shared, src=dist.get_global_rank(group, 0), group=group)
        name = bytes(shared.tolist())
    return name.hex()
