"""What deploys a fleet: every configuration file loads, and the charts, images and units are right.

Helm's own engine renders the chart, Kubernetes' own schemas check it, hadolint reads the
Dockerfiles, and systemd the unit where it is there to do so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

import kvstrata
from kvstrata.config import Config, load_config
from kvstrata.config.files import read_file

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "kvstrata"
COMPOSE = ROOT / "examples" / "compose" / "compose.yaml"
CONFIGURATIONS = sorted([*ROOT.glob("examples/**/*.toml"), *ROOT.glob("deploy/**/*.toml")])
SCHEMAS = ("1.27", "1.33", "1.37")

EVERYTHING: Mapping[str, Any] = {
    "vllm": {
        "enabled": True,
        "args": ["--max-model-len", "8192"],
        "envFrom": [{"secretRef": {"name": "hub"}}],
    },
    "node": {
        "diskFolder": "",
        "hostPID": False,
        "env": [{"name": "KVSTRATA_LOG", "value": "debug"}],
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"operator": "Exists"}],
    },
    "secret": {"existing": "mine"},
}


def load(overrides: Mapping[str, Any]) -> Config:
    """As a node reads it, on a machine that is large enough."""
    return load_config(
        environ={}, overrides=overrides, memory_bytes=1 << 50, disk_bytes=lambda _: 1 << 50
    )


def rendered(values: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """What the chart makes of these values, by kind."""
    files = helm_python.Chart.load(CHART).render(dict(values or {}), name="r", namespace="n")
    documents = [one for text in files.values() for one in yaml.safe_load_all(text) if one]
    made = {one["kind"]: one for one in documents}
    assert len(made) == len(documents)
    return made


def pod(made: Mapping[str, Any]) -> Any:
    return made["spec"]["template"]["spec"]


def node_of(text: str) -> PurePosixPath:
    """The socket that an engine's ``--kv-transfer-config`` names."""
    options = json.loads(text)
    assert options["kv_connector"] == "KVStrataConnector"
    assert options["kv_connector_module_path"] == "kvstrata.connectors.vllm"
    assert options["kv_load_failure_policy"] == "recompute"
    node = load(options["kv_connector_extra_config"]).node
    return PurePosixPath(node.removeprefix("unix:"))


def test_there_are_configurations() -> None:
    assert len(CONFIGURATIONS) >= 5


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_configuration_loads(file: Path) -> None:
    config = load(read_file(file))
    assert config.node.startswith("unix:/")
    assert PurePosixPath(config.secret_file).is_absolute()


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_commented_out_of_a_configuration_loads_too(file: Path, tmp_path: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    shown = [
        line.removeprefix("# ")
        for line in lines
        if line.startswith("# ") and ("=" in line or line.startswith("# ["))
    ]
    whole = tmp_path / "kvstrata.toml"
    whole.write_text("\n".join([*(line for line in lines if not line.startswith("#")), *shown]))
    load(read_file(whole))


class TestChart:
    @pytest.mark.parametrize("version", SCHEMAS)
    @pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
    def test_kubernetes_takes_it(self, values: Mapping[str, Any], version: str) -> None:
        for made in rendered(values).values():
            kubernetes_validate.validate(made, version, strict=True)

    @pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
    def test_helm_has_nothing_to_say(self, values: Mapping[str, Any]) -> None:
        found = helm_python.lint(CHART, dict(values), strict=True)
        assert found["errors"] == []
        assert [one["error"] for one in found["messages"]] == ["icon is recommended"]

    def test_it_makes_what_it_should(self) -> None:
        assert set(rendered()) == {"ConfigMap", "Secret", "DaemonSet"}
        assert set(rendered(EVERYTHING)) == {"ConfigMap", "DaemonSet", "Deployment", "Service"}

    def test_the_configuration_fits_the_pod(self, tmp_path: Path) -> None:
        made = rendered()
        file = tmp_path / "kvstrata.toml"
        file.write_text(made["ConfigMap"]["data"]["kvstrata.toml"])
        config = load(read_file(file))
        (node,) = pod(made["DaemonSet"])["containers"]
        mounts = {one["mountPath"]: one for one in node["volumeMounts"]}
        assert str(Path(config.node.removeprefix("unix:")).parent) in mounts
        assert str(config.secret_file.parent) in mounts
        disk = config.tier("disk")
        assert disk is not None
        assert str(disk.path.parent) in mounts  # type: ignore[attr-defined]
        assert "/etc/kvstrata" in mounts
        capacity = config.host.capacity
        limit = int(node["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
        assert isinstance(capacity, int)
        assert capacity + (2 << 30) <= limit

    def test_the_engine_finds_the_node(self) -> None:
        made = rendered(EVERYTHING)
        (engine,) = pod(made["Deployment"])["containers"]
        arguments = engine["args"]
        socket = node_of(arguments[arguments.index("--kv-transfer-config") + 1])
        volume = {one["mountPath"]: one["name"] for one in engine["volumeMounts"]}
        volumes = [
            {one["name"]: one for one in pod(made[kind])["volumes"]}
            for kind in ("Deployment", "DaemonSet")
        ]
        assert volumes[0][volume[str(socket.parent)]] == volumes[1]["socket"]
        assert arguments[-2:] == ["--max-model-len", "8192"]

    def test_nothing_runs_with_more_rights_than_it_needs(self) -> None:
        spec = pod(rendered()["DaemonSet"])
        (node,), (folders,) = spec["containers"], spec["initContainers"]
        assert node["securityContext"] == {
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert folders["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert spec["automountServiceAccountToken"] is False
        assert not spec.get("hostIPC")
        assert not spec.get("hostNetwork")

    def test_selectors_select_their_pods_and_no_others(self) -> None:
        made = rendered(EVERYTHING)
        labels = {
            kind: made[kind]["spec"]["template"]["metadata"]["labels"]
            for kind in ("DaemonSet", "Deployment")
        }
        for kind, other in (("DaemonSet", "Deployment"), ("Deployment", "DaemonSet")):
            selector = made[kind]["spec"]["selector"]["matchLabels"].items()
            assert selector <= labels[kind].items()
            assert not selector <= labels[other].items()
        assert made["Service"]["spec"]["selector"].items() <= labels["Deployment"].items()

    def test_a_changed_configuration_restarts_the_nodes(self) -> None:
        def annotations(values: Mapping[str, Any]) -> Any:
            return rendered(values)["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]

        assert annotations({}) != annotations({"config": "chunk_tokens = 256"})

    def test_versions_are_the_release(self) -> None:
        chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        assert chart["appVersion"] == kvstrata.__version__
        for part in ("node", "vllm"):
            assert values[part]["image"].endswith(f":{kvstrata.__version__}")


def test_the_init_container_leaves_what_a_node_takes(tmp_path: Path) -> None:
    """Its very script, with its folders moved here, and this process's user in place of 10001."""
    (folders,) = pod(rendered()["DaemonSet"])["initContainers"]
    (script,) = folders["args"]
    for name in ("/run/kvstrata-secret", "/run/kvstrata", "/var/cache/kvstrata", "/secret/"):
        script = script.replace(f" {name}", f" {tmp_path}{name}")
    script = script.replace("10001", str(os.getuid()), 1).replace("-g 10001", f"-g {os.getgid()}")
    script = script.replace("10001", str(os.getuid()))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "secret").write_bytes(bytes(range(32)))
    (tmp_path / "secret" / "secret").chmod(0o440)
    (tmp_path / "run" / "kvstrata-secret").mkdir(parents=True)
    subprocess.run(["sh", "-ec", script], check=True)
    from kvstrata.secret import load_secrets

    assert load_secrets(tmp_path / "run/kvstrata-secret/secret") == (bytes(range(32)),)
    assert (tmp_path / "run/kvstrata").is_dir()
    assert (tmp_path / "var/cache/kvstrata").stat().st_mode & 0o777 == 0o700


class TestCompose:
    content: Any = yaml.safe_load(COMPOSE.read_text())

    def test_the_three_find_each_other(self) -> None:
        services = self.content["services"]
        config = load(read_file(COMPOSE.parent / "kvstrata.toml"))
        redis = config.tier("redis")
        assert redis is not None
        assert redis.url.url.split("//")[1] in {f"{name}:6379" for name in services}  # type: ignore[attr-defined]
        command = services["vllm"]["command"]
        socket = node_of(command[command.index("--kv-transfer-config") + 1])
        assert f"unix:{socket}" == config.node
        for name in ("node", "vllm"):
            assert f"socket:{socket.parent}" in services[name]["volumes"]
        mounted = {one.split(":")[1] for one in services["node"]["volumes"]}
        assert str(config.secret_file.parent) in mounted

    def test_what_it_names_is_there(self) -> None:
        services, volumes = self.content["services"], self.content["volumes"]
        for service in services.values():
            for one in service.get("volumes", ()):
                source = one.split(":")[0]
                assert source in volumes or (COMPOSE.parent / source).exists()
            if build := service.get("build"):
                context = (COMPOSE.parent / build["context"]).resolve()
                assert context == ROOT
                assert (context / build["dockerfile"]).exists()
            for other in service.get("depends_on", ()):
                healthy = (
                    "healthcheck" in services[other]
                    or "HEALTHCHECK" in (ROOT / services[other]["build"]["dockerfile"]).read_text()
                )
                assert healthy
        assert services["vllm"]["ports"] == ["127.0.0.1:8000:8000"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
class TestImages:
    def test_hadolint_has_nothing_to_say(self, name: str) -> None:
        hadolint = Path(sys.executable).parent / "hadolint"
        subprocess.run([hadolint, ROOT / "deploy" / "docker" / name], check=True)

    def test_what_is_copied_is_in_the_context(self, name: str) -> None:
        folder = ROOT / "deploy" / "docker"
        ignore = (folder / f"{name}.dockerignore").read_text().splitlines()
        allowed = {line[1:] for line in ignore if line.startswith("!")}
        assert ignore[0] == "*"
        copied = {
            word
            for line in (folder / name).read_text().splitlines()
            if line.startswith("COPY ") and "--from" not in line
            for word in line.split()[1:-1]
        }
        assert copied == allowed
        assert all((ROOT / one).exists() for one in copied)


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = (ROOT / "deploy" / "systemd" / "kvstrata.service").read_text()
    config = load(read_file(ROOT / "deploy" / "systemd" / "kvstrata.toml"))
    for folder, given in (
        (config.node.removeprefix("unix:"), "/run/"),
        (config.secret_file, "/var/lib/"),
        (config.tier("disk").path, "/var/cache/"),  # type: ignore[union-attr]
    ):
        assert str(folder).startswith(f"{given}kvstrata/")
    for kind in ("Runtime", "State", "Cache"):
        assert f"\n{kind}Directory=kvstrata\n" in unit
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    program = "/opt/kvstrata/bin/kvstrata"
    assert f"ExecStart={program} serve --config /etc/kvstrata/kvstrata.toml\n" in unit
    file = tmp_path / "kvstrata.service"
    file.write_text(unit.replace(program, sys.executable))
    verified = subprocess.run([analyze, "verify", file], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    assert file.name not in verified.stderr, "a line that it ignores"
    rating = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=25", file], capture_output=True
    )
    assert rating.returncode == 0, rating.stdout.decode()
