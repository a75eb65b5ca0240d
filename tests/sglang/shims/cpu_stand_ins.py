"""What lets SGLang's own packages from PyPI serve on a machine without a GPU.

Its wheels lean on compiled parts of which only CUDA builds exist, and HiCache takes for granted
that host memory can be pinned. What is here replaces no decision of SGLang's: its tree, controller,
pools and threads run as they are. Each change is made when SGLang first imports the module that it
concerns, in every process that has this folder on its path.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

HOST_RESERVE_BYTES = 1 << 30
COPIES = (
    "transfer_kv_direct",
    "transfer_kv_per_layer_direct_pf_lf",
    "transfer_kv_all_layer_direct_lf_pf",
)


def install() -> None:
    """Have the stand-ins take their places as modules are imported. Repeatable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _declare_operators() -> None:
    """PyPI's torchvision has its operators in a CUDA library, which does not load; it only wants to
    say what shapes two of them give. Nobody calls them for text."""
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )


def _reserve_less(module: Any) -> None:
    """SGLang leaves 10 GiB of the machine's memory free beside a host pool; two test machines'
    worth."""
    module.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_RESERVE_BYTES


def _plain_host_pools(module: Any) -> None:
    """Host pools whose memory is not pinned, and whose copies from and to the engine's pool, which
    SGLang imports for GPUs only, are there."""
    copies = importlib.import_module("sgl_kernel.kvcacheio")
    for name in COPIES:
        setattr(module, name, getattr(copies, name))
    for made in list(vars(module).values()):
        if isinstance(made, type) and made.__module__ == module.__name__:
            _pin_nothing(made)


def _pin_nothing(pool: Any) -> None:
    """Make this class of pools without ``pin_memory``, which is true by default."""
    make = pool.__init__
    if "pin_memory" not in inspect.signature(make).parameters:
        return

    @functools.wraps(make)
    def make_unpinned(*arguments: Any, **options: Any) -> None:
        make(*arguments, **{**options, "pin_memory": False})

    pool.__init__ = make_unpinned


def _never_wait(module: Any) -> None:
    """torch's streams of a CPU lack the calls that wait; none of them ever runs ahead."""
    import torch

    for name in ("wait_stream", "wait_event", "synchronize"):
        if not hasattr(torch.cpu.Stream, name):
            setattr(torch.cpu.Stream, name, lambda self, *others: None)


class _Unpinned:
    """torch, whose new tensors are never pinned."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._torch, name)
        if name not in ("tensor", "empty", "zeros", "arange"):
            return found
        return lambda *values, **options: found(*values, **{**options, "pin_memory": False})


def _plain_adapters(module: Any) -> None:
    """Adapters pin a few small tensors beside them, whatever the device."""
    import torch

    module.torch = _Unpinned(torch)
    torch.Tensor.pin_memory = lambda tensor: tensor


_POOLS = "sglang.srt.mem_cache.pool_host"
_BEFORE: dict[str, Callable[[], None]] = {"torchvision": _declare_operators}
_AFTER: dict[str, Callable[[Any], None]] = {
    f"{_POOLS}.base": _reserve_less,
    f"{_POOLS}.mha": _plain_host_pools,
    f"{_POOLS}.mla": _plain_host_pools,
    f"{_POOLS}.mamba": _plain_host_pools,
    "sglang.srt.lora.layers": _plain_adapters,
    "sglang.srt.lora.backend.torch_backend": _plain_adapters,
    "sglang.srt.mem_cache.l2_transfer": _never_wait,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself; acts before or after what the others find is first run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if before := _BEFORE.pop(name, None):
            before()
        after = _AFTER.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if after else None
        if after is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            after(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec
