"""Code that runs with a small file system of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in ("src", "."))


def in_private_mount(code: str, folder: Path, options: str) -> tuple[int, str, str]:
    """Run code with a tmpfs on ``folder`` that exists for that process only; skip if impossible."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    command = [unshare, "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = f'mount -t tmpfs -o {options} none "$1" && exec "$0" -c "$2" "$1"'
    probe = f'mount -t tmpfs -o {options} none "$0"'
    folder.mkdir(exist_ok=True)
    if subprocess.run(
        [*command, "sh", "-c", probe, str(folder)], stderr=subprocess.PIPE
    ).returncode:
        pytest.skip("this process may not mount")
    done = subprocess.run(
        [*command, "sh", "-c", mount, sys.executable, str(folder), code],
        env={**os.environ, "PYTHONPATH": SOURCES},
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()
