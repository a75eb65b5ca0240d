"""What people install: the built wheel, in a clean environment of every Python that is at hand.

Neither torch nor an engine is in that environment: a node and its commands need none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
LIGHT_EXTRAS = "redis,s3,control"
# Who may need more than is there: the engine's side, the GPU's kernels, authors' contract suites.
NEED_MORE = {
    "kvstrata.connectors": {"sglang", "torch", "transformers", "vllm"},
    "kvstrata.codecs.triton": {"torch", "triton"},
    "kvstrata.selection": {"torch", "transformers"},
    "kvstrata.quality.selections": {"torch", "transformers"},
    "kvstrata.testing": {"pytest"},
    "kvstrata.node.coding.sealing": {"cryptography"},
    "kvstrata.proxy": {"aiohttp"},
    "kvstrata.observe.rendering": {"prometheus_client"},
    "kvstrata.control": {"httpx"},
}

IMPORT_ALL = """
import importlib, json, pkgutil, kvstrata
missing = {}
for module in pkgutil.walk_packages(kvstrata.__path__, "kvstrata."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name
print(json.dumps(missing))
"""


def interpreter(version: str) -> str | None:
    """A Python of this version that can make environments: this one, the PATH's, pyenv's, uv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    uv = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share"), "uv/python")
    name = f"python{version}"
    found = [sys.executable, shutil.which(name), f"/usr/bin/{name}", f"/usr/local/bin/{name}"]
    found += map(str, sorted(pyenv.glob(f"{version}.*/bin/{name}")))
    found += map(str, sorted(uv.glob(f"cpython-{version}.*/bin/{name}")))
    ask = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, found):
        try:
            said = subprocess.run([place, "-c", ask], capture_output=True, text=True)
        except OSError:
            continue
        if said.stdout.strip() == version:
            return place
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: what an earlier build left lying about must not get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    rubbish = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=rubbish)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    (built,) = out.glob("kvstrata-*.whl")
    return built


@pytest.fixture(scope="module", params=VERSIONS)
def binaries(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The ``bin`` of a clean environment with the wheel and its light extras."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"there is no Python {request.param} here")
    folder = tmp_path_factory.mktemp(f"python{request.param}")
    run(python, "-m", "venv", folder)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile"]
    run(*pip, f"{wheel}[{LIGHT_EXTRAS}]")
    return folder / "bin"


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty home, with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


def run(*command: object, home: Path | None = None) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        list(map(str, command)), env=environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(home: Path | None) -> dict[str, str]:
    """Nothing of ours; with a home, nothing of this user's either."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTRATA_")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "XDG_RUNTIME_DIR"):
        kept.pop(name, None)
    if home is not None:
        own = {"XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        kept |= {"HOME": str(home)} | {name: str(home / place) for name, place in own.items()}
    return kept


def test_it_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/kvstrata").rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js", ".json") or path.name == "py.typed"
    }
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        needs = [
            line.split(":")[1].strip()
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist") and "extra ==" not in line
        ]
    assert packed == sources
    assert needs
    assert not [need for need in needs if need.startswith(("sglang", "torch", "triton", "vllm"))]


def test_every_module_of_the_core_imports(binaries: Path, home: Path) -> None:
    missing = json.loads(run(binaries / "python", "-W", "error", "-c", IMPORT_ALL, home=home))
    for room, libraries in NEED_MORE.items():
        lacking = {name for name in missing if name.startswith(room)}
        assert {missing.pop(name) for name in lacking} <= libraries
    assert missing == {}


def test_the_command_says_what_it_can_do(binaries: Path, home: Path) -> None:
    kvstrata = binaries / "kvstrata"
    assert "doctor" in run(kvstrata, "--help", home=home)
    assert "--socket" in run(kvstrata, "serve", "--help", home=home)
    assert "[host]" in run(kvstrata, "config", home=home)


def test_a_node_serves_and_is_found_well(binaries: Path, home: Path) -> None:
    kvstrata, node = binaries / "kvstrata", f"unix:{home}/node.sock"
    settings = {
        "host.capacity": "64MiB",
        "disk.path": home / "disk",
        "disk.capacity": "64MiB",
        "disk.codec": "lossless",
    }
    options = [f"--set={key}={value}" for key, value in settings.items()]
    serving = subprocess.Popen(
        [kvstrata, "serve", "--socket", node, *options],
        env=environment(home), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert serving.stdout is not None
    with serving.stdout:
        try:
            assert any(line.startswith("serving on") for line in serving.stdout)
            state = json.loads(run(kvstrata, "status", "--node", node, "--json", home=home))
            assert state["tiers_left_out"] == {}
            assert [tier["codec"] for tier in state["tiers"]] == ["lossless"]
            said = run(kvstrata, "doctor", "--node", node, "--json", *options, home=home)
            results = {check["name"]: check["result"] for check in json.loads(said)["checks"]}
            assert {results[name] for name in ("host read", "disk read", "clean up")} == {"ok"}
            assert "FAIL" not in results.values()
        finally:
            serving.terminate()
        assert "drained, and ended" in serving.stdout.read()
    assert serving.wait() == 0
