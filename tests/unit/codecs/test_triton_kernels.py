"""The kernels write the bytes and read the numbers of the CPU: in Triton's interpreter, where no
GPU is at hand; and they compile for GPUs.

Each of these needs a process of its own: `triton_layers`, `triton_compiled`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from tests.unit.codecs.triton_layers import CASES  # noqa: E402 - it imports both

ROOT = Path(__file__).parents[3]
KERNELS = {
    "fp8": {"_encode", "_decode"},
    "integers": {"_encode", "_decode"},
    "rotation": {"rotate_kernel", "mean_kernel", "quantise_kernel", "restore_kernel"},
}


def _run(module: str, *arguments: str, **environment: str) -> str:
    """What the module prints."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", f"tests.unit.codecs.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    outcomes: dict[str, str] = json.loads(_run("triton_layers", "cpu", TRITON_INTERPRET="1"))
    return outcomes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_and_numbers_are_those_of_the_cpu(case: object, interpreted: dict[str, str]) -> None:
    assert interpreted[str(case)] == "same"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    outcomes = json.loads(_run("triton_layers", "cuda", TRITON_INTERPRET="0"))
    assert {case: outcome for case, outcome in outcomes.items() if outcome != "same"} == {}


def test_every_kernel_compiles_for_a_gpu_and_rounds_as_the_cpu_does(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    compiled = set(_run("triton_compiled", **environment).split())
    assert compiled == {f"{file}.{name}" for file, names in KERNELS.items() for name in names}
