"""LMCache in a folder of its own, beside this environment and never in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import say

RELEASE = "0.5.6"
# The few of its dependencies that vLLM does not bring; the others are not needed on a CPU.
PACKAGES = (
    f"lmcache=={RELEASE}",
    "aiofile",
    "aiofiles",
    "caio",
    "nvtx",
    "opentelemetry-exporter-prometheus",
    "sortedcontainers",
)
LAST_LINES = 5


class NotInstalled(Exception):
    """LMCache cannot be had here."""


def overlay(parent: Path) -> Path:
    """The folder to put on ``PYTHONPATH``; made on first use.

    Args:
        parent: where it lies.
    Raises:
        NotInstalled: pip could not install it.
    """
    folder = parent / f"lmcache-{RELEASE}"
    if folder.is_dir():
        return folder
    say(f"installing LMCache {RELEASE} into {folder} (once)")
    parent.mkdir(parents=True, exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix="lmcache-", dir=parent))
    try:
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        done = subprocess.run([sys.executable, *command, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            raise NotInstalled("\n".join(done.stderr.strip().splitlines()[-LAST_LINES:]))
        target.rename(folder)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return folder


def with_overlay(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment, with what is in the folder found after everything else."""
    path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(folder)]))
    return {**environment, "PYTHONPATH": path, "LMCACHE_TRACK_USAGE": "false"}
