"""The wheel that users install: into a clean environment of each Python, and its commands run.

``make test`` runs this; an interpreter that the machine lacks is a visible skip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]
EXTRAS = "redis,s3,control"
TIMEOUT_S = 600


def interpreter(version: str) -> Path | None:
    """A Python of this version: on the PATH, or where pyenv keeps its own."""
    found = shutil.which(f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(root.glob(f"{version}.*/bin/python")), *([Path(found)] if found else [])]
    asking = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        said = subprocess.run(
            [candidate, "-c", asking], capture_output=True, text=True, check=False
        )  # a shim of pyenv may be there without its Python
        if said.stdout.strip() == version:
            return candidate
    return None


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "-w", str(folder), str(ROOT)], check=True, timeout=TIMEOUT_S, cwd=folder)
    (built,) = folder.glob("kvstrata-*.whl")
    return built


@pytest.fixture(scope="session", params=["3.10", "3.11", "3.12", "3.13"])
def kvstrata(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The command, in an environment that has the wheel, its light extras and nothing else."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"this machine has no Python {request.param}")
    folder = tmp_path_factory.mktemp(f"python-{request.param}")
    subprocess.run([python, "-m", "venv", folder], check=True, timeout=TIMEOUT_S)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{wheel}[{EXTRAS}]"], check=True, timeout=TIMEOUT_S)
    yield folder / "bin/kvstrata"
    shutil.rmtree(folder)


def test_the_commands_of_an_installed_wheel(kvstrata: Path, tmp_path: Path) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "KVSTRATA_HOST_CAPACITY": "32MiB",
        "KVSTRATA_DISK_PATH": str(tmp_path / "disk"),
        "KVSTRATA_DISK_CAPACITY": "64MiB",
        "KVSTRATA_DISK_CODEC": "lossless",
        "KVSTRATA_LINGER": "100ms",
    }

    def run(*arguments: str) -> str:
        said = subprocess.run(
            [kvstrata, *arguments],
            env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    for command in ("serve", "status", "config", "clear", "doctor", "demo", "quality", "calibrate"):
        assert command in run("--help")
        assert run(command, "--help")
    assert 'capacity = "32MiB"' in run("config")
    with subprocess.Popen(
        [kvstrata, "serve"], env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            assert service.stdout is not None
            assert any(line.startswith("serving on") for line in service.stdout)
            status = json.loads(run("status", "--json"))
            assert [tier["codec"] for tier in status["tiers"]] == ["lossless"]
            assert "KVStrata works" in run("doctor")
        finally:
            service.terminate()
        assert service.wait(60) == 0
