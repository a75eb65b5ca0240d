"""Configuration: every source is one parser, nothing is ignored, what is printed loads again."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata import cli
from kvstrata.config import (
    OPTIONS,
    OTHER_VARIABLES,
    Config,
    effective,
    host_capacity_bytes,
    load_config,
)
from kvstrata.config.files import read_file
from kvstrata.config.owned import DiskConfig, file_system_bytes
from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.wire.protocol import PROTOCOL_VERSION
from kvstrata.wire.sockets import socket_path

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
KEY = "f5" * 32

# One accepted value per option, different from its default.
SAMPLES: Mapping[str, Any] = {
    "node": "unix:/run/kvstrata/node.sock",
    "chunk_tokens": 256,
    "tenant": "Zoë & söhne",
    "secret_file": "/etc/kvstrata/secret",
    "linger": "1min",
    "log": "debug",
    "quality": "kl <= 0.01 and agreement >= 0.98",
    "planner": "off",
    "meet": "on",
    "blend": "on",
    "inside": "off",
    "canary": "off",
    "hints": "store, pin",
    "reset": "keep",
    "share": "engines, ranks",
    "host.capacity": "3GiB",
    "host.policy": "s3fifo",
    "host.verify_every": 1,
    "memory.capacity": "2GiB",
    "memory.policy": "cost",
    "memory.codec": "raw",
    "memory.io_threads": 3,
    "memory.write_queue": "2MiB",
    "memory.scrub_rate": "1MiB/s",
    "disk.path": "/var/cache/kv",
    "disk.capacity": "200GB",
    "disk.policy": "cost",
    "disk.codec": "lossless",
    "disk.coarser": "cachegen-2, int4",
    "disk.load_target": "500ms",
    "disk.encryption": "file:/etc/kvstrata/keys",
    "disk.io_threads": 6,
    "disk.write_queue": "1GiB",
    "disk.scrub_rate": 0,
    "peer.nodes": "10.0.0.2:7788, [fd00::3]:7788",
    "peer.named": "loopback, 10.0.0.2:7788, 10.0.0.0/24:7788",
    "peer.io_threads": 4,
    "peer.lookup_timeout": "30ms",
    "network.listen": "10.0.0.1:7788",
    "network.advertise": "node-a:7788",
    "network.trusted": "yes, I trust this network",
    "network.transport": "nixl",
    "network.certificate": "/etc/kvstrata/node.pem",
    "network.key": "/etc/kvstrata/node.key",
    "network.authority": "/etc/kvstrata/ca.pem",
    "fleet.registry": "rediss://kv@[::1]:7000/2?ca_file=/etc/ca.pem",
    "fleet.name": "node-7",
    "fleet.prefix": "fleet-1",
    "api.listen": "unix:/run/kvstrata/api.sock",
    "api.token_file": "/etc/kvstrata/tokens",
    "api.tls_certificate": "/etc/kvstrata/api.pem",
    "api.tls_key": "/etc/kvstrata/api.key",
    "redis.codec": "lossless",
    "redis.coarser": "cachegen-2, int4",
    "redis.load_target": "500ms",
    "redis.encryption": "file:/etc/kvstrata/keys",
    "redis.io_threads": 6,
    "redis.write_queue": "1GiB",
    "redis.lookup_timeout": "30ms",
    "redis.epoch_every": "10s",
    "redis.url": "rediss+cluster://kv@[::1]:7000,b:7001?ca_file=/etc/ca.pem",
    "redis.prefix": "fleet-1",
    "redis.ttl": "7d",
    "mooncake.codec": "lossless",
    "mooncake.encryption": "file:/etc/kvstrata/keys",
    "mooncake.coarser": "cachegen-2, int4",
    "mooncake.load_target": "500ms",
    "mooncake.io_threads": 6,
    "mooncake.write_queue": "1GiB",
    "mooncake.lookup_timeout": "30ms",
    "mooncake.epoch_every": "10s",
    "mooncake.master": "[fe80::1]:50051",
    "mooncake.metadata": "http://10.0.0.1:8080/metadata",
    "mooncake.protocol": "rdma",
    "mooncake.device": "mlx5_0,mlx5_1",
    "mooncake.segment": "2GiB",
    "mooncake.buffer": "128MiB",
    "mooncake.replicas": 2,
    "mooncake.soft_pin": "on",
    "mooncake.prefix": "fleet-1",
    "object_store.url": "s3://bucket/kvstrata",
    "object_store.capacity": "the store's",
    "object_store.endpoint": "http://10.0.0.1:9000",
    "object_store.region": "eu-central-1",
    "object_store.codec": "lossless",
    "object_store.coarser": "cachegen-2, int4",
    "object_store.load_target": "500ms",
    "object_store.encryption": "env:KV_KEYS",
    "object_store.io_threads": 6,
    "object_store.write_queue": "1GiB",
    "object_store.lookup_timeout": "30ms",
    "object_store.epoch_every": "10s",
    "deadlines.match": "1ms",
    "deadlines.request": "1s",
    "deadlines.load": "2.5s",
    "deadlines.attach": "1min",
    "leases.per_client": "10%",
    "leases.total": "90%",
    "tracing.endpoint": "https://collector:4318/v1/traces",
    "tracing.sample": "2%",
    "pins.per_tenant": "5%",
    "pins.total": "50%",
}


def load(
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """On a machine of 64 GiB memory and 1 TiB disk, with an empty environment."""
    return load_config(
        file, environ or {}, overrides, memory_bytes=64 * GIB, disk_bytes=lambda path: 1024 * GIB
    )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        part, _, name = path.rpartition(".")
        (tree.setdefault(part, {}) if part else tree)[name] = value
    return tree


def variables(flat: Mapping[str, Any]) -> dict[str, str]:
    return {OPTIONS[path].variable: str(value) for path, value in flat.items()}


def test_defaults() -> None:
    config = load()
    assert config == Config(secret_file=config.secret_file)
    assert (config.node, config.chunk_tokens, config.tiers) == ("auto", 128, ())
    assert (config.linger, config.deadlines.match, config.deadlines.load) == (5.0, 0.002, 10.0)
    assert config.host.capacity == Fraction(1, 5)
    assert (config.leases.per_client, config.leases.total) == (Fraction(1, 2), Fraction(4, 5))
    with pytest.raises(FrozenInstanceError):
        config.tenant = "other"  # type: ignore[misc]


def test_every_source_gives_the_same_configuration(tmp_path: Path) -> None:
    assert SAMPLES.keys() == OPTIONS.keys()
    yaml_file, toml_file = tmp_path / "kv.yaml", tmp_path / "kv.toml"
    yaml_file.write_text(json.dumps(nested(SAMPLES)))  # JSON is YAML
    want = load(SAMPLES)
    toml_file.write_text(effective(want))
    for config in (
        load(nested(SAMPLES)),
        load(environ=variables(SAMPLES)),
        load(file=yaml_file),
        load(file=toml_file),
        load(environ={"KVSTRATA_CONFIG": str(toml_file)}),
    ):
        assert config == want
    for path, option in OPTIONS.items():
        assert option.kind.format(_value(want, path)) != option.default, "samples differ"


def test_what_is_printed_of_a_default_is_read_again() -> None:
    """A node that is started on demand gets its options as they are printed."""
    for path, option in OPTIONS.items():
        if option.default is not None:
            value = option.kind.parse(option.default)
            assert option.kind.parse(option.kind.format(value)) == value, path


def _value(config: Config, path: str) -> Any:
    part, _, name = path.rpartition(".")
    owner = config if not part else config.tier(part) or getattr(config, part)
    return getattr(owner, name)


def test_precedence_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    file.write_text('tenant = "file"\nlog = "error"\n[host]\ncapacity = "1GiB"\npolicy = "cost"')
    environ = {"KVSTRATA_TENANT": "environment", "KVSTRATA_HOST_CAPACITY": "2GiB"}
    config = load({"tenant": "override"}, environ, file)
    assert (config.tenant, config.host.capacity) == ("override", 2 * GIB)
    assert (config.log, config.host.policy) == ("error", "cost")
    assert config.sources == {
        "tenant": "override",
        "host.capacity": "environment",
        "log": "file",
        "host.policy": "file",
    }
    lines = effective(config).splitlines()
    assert 'tenant = "override"  # override' in lines
    assert 'capacity = "2GiB"  # environment' in lines
    assert "verify_every = 64  # default" in lines


def test_a_file_named_by_argument_comes_before_the_variable(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('tenant = "a"')
    environ = {"KVSTRATA_CONFIG": str(tmp_path / "missing.toml")}
    assert load(environ=environ, file=tmp_path / "a.toml").tenant == "a"


def test_parts_of_the_disk_may_come_from_different_sources() -> None:
    config = load({"disk.path": "/d"}, {"KVSTRATA_DISK_CAPACITY": "1GiB"})
    (disk,) = config.tiers
    assert isinstance(disk, DiskConfig)
    assert (disk.path, disk.capacity) == (Path("/d"), GIB)


@pytest.mark.parametrize(
    ("overrides", "path", "problem"),
    [
        ({"host.capcity": "1GiB"}, "host.capcity", "did you mean host.capacity"),
        ({"host": {"capcity": "1GiB"}}, "host.capcity", "did you mean host.capacity"),
        ({"path": "/x"}, "path", "did you mean disk.path"),
        (
            {"capacity": 1},
            "capacity",
            "did you mean host.capacity or memory.capacity or disk.capacity",
        ),
        ({"host_capacity": 1}, "host_capacity", "did you mean host.capacity"),
        ({"zzz": 1}, "zzz", "expected one of node, chunk_tokens"),
        ({"": 1}, "", "unknown key"),
        ({1: 2}, "1", "unknown key"),
        ({"sources": {}}, "sources", "unknown key"),
        ({"host": "8GiB"}, "host", "not a table of capacity, policy, verify_every"),
        ({"host": None}, "host", "not a table"),
        ({"host": {"capacity": 1}, "host.capacity": 2}, "host.capacity", "given twice"),
        ({"host.capacity": "8G"}, "host.capacity", "unknown unit 'G'"),
        ({"host.capacity": "-8GiB"}, "host.capacity", "negative"),
        ({"host.capacity": 8}, "host.capacity", "less than 1MiB"),
        ({"host.capacity": "0%"}, "host.capacity", "leaves nothing"),
        ({"host.capacity": "101%"}, "host.capacity", "more than 100%"),
        ({"host.capacity": 0.2}, "host.capacity", "is not a size"),
        ({"host.capacity": "65GiB"}, "host.capacity", "memory this machine has.*at most 64GiB"),
        ({"host.policy": "lur"}, "host.policy", "did you mean lru.*one of lru, s3fifo, cost"),
        ({"host.policy": ["lru"]}, "host.policy", "is not known"),
        ({"host.verify_every": -1}, "host.verify_every", "from 0 to 1000000"),
        ({"chunk_tokens": 100}, "chunk_tokens", "a multiple of 16 from 16 to 4096"),
        ({"chunk_tokens": 0}, "chunk_tokens", "from 16 to 4096"),
        ({"chunk_tokens": 8192}, "chunk_tokens", "from 16 to 4096"),
        ({"chunk_tokens": True}, "chunk_tokens", "not a whole number"),
        ({"chunk_tokens": 128.0}, "chunk_tokens", "not a whole number"),
        ({"tenant": ""}, "tenant", "1 to 128 printable"),
        ({"tenant": "a\nb"}, "tenant", "1 to 128 printable"),
        ({"tenant": 7}, "tenant", "1 to 128 printable"),
        ({"linger": 5}, "linger", "is not a duration"),
        ({"linger": "5"}, "linger", "no unit"),
        ({"deadlines.load": "0s"}, "deadlines.load", "leaves no time"),
        ({"leases.total": "40%"}, "leases.per_client", "50% is more than leases.total, 40%"),
        ({"pins.total": "5%"}, "pins.per_tenant", "10% is more than pins.total, 5%"),
        ({"node": "tcp:1"}, "node", '"auto", or "unix:"'),
        ({"node": "unix:x.sock"}, "node", "not absolute"),
        ({"node": "unix:/" + "x" * 107}, "node", "longer than a socket's 107 bytes"),
        ({"secret_file": "secret"}, "secret_file", "not absolute"),
        ({"secret_file": "/a\0b"}, "secret_file", "not a path"),
        ({"disk": {}}, "disk.path", "missing"),
        ({"quality": "kl > 1"}, "quality", "is not a metric"),
        ({"disk.encryption": KEY}, "disk.encryption", "no source of keys"),
        ({"disk.encryption": 7}, "disk.encryption", "no source of keys"),
        ({"disk.encryption": "file:keys"}, "disk.encryption", "not absolute"),
        ({"disk.encryption": "file:/a\0b"}, "disk.encryption", "not printable"),
        ({"disk.encryption": "env:A-B"}, "disk.encryption", "no name of a variable"),
        ({"disk.encryption": f"env:{KEY}"}, "disk.encryption", "env: is a key"),
        ({"disk.encryption": "env:KVSTRATA_KEYS"}, "disk.encryption", "name another one"),
        ({"disk.encryption": "command:"}, "disk.encryption", "what follows command: is empty"),
        ({"disk.encryption": "command:a 'b"}, "disk.encryption", "No closing quotation"),
        ({"memory.encryption": "none"}, "memory.encryption", "unknown key"),
        ({"disk": {"coarser": "lossless"}}, "disk.coarser", "'lossless' is no lossy codec"),
        ({"disk": {"coarser": "cachegen-9"}}, "disk.coarser", "no codec 'cachegen-9'"),
        ({"disk": {"coarser": ["int4"] * 16}}, "disk.coarser", "at most 15 names"),
        (
            {"disk": {"path": "/d", "capacity": "1GiB", "coarser": ["int4"]}},
            "disk.load_target",
            "missing, but disk.coarser is given",
        ),
        (
            {"disk": {"path": "/d", "capacity": "1GiB", "codec": "auto"}},
            "quality",
            "missing, but disk.codec is auto",
        ),
        ({"memory.codec": "raw"}, "memory.capacity", "missing, but memory.codec is given"),
        (
            {"host.capacity": "40GiB", "memory.capacity": "30GiB"},
            "memory.capacity",
            "30GiB is more than the memory this machine has beside host.capacity",
        ),
        ({"disk.path": "/d"}, "disk.capacity", "missing, but disk.path is given"),
        ({"disk.capacity": "1GiB"}, "disk.path", "missing, but disk.capacity is given"),
        ({"disk.io_threads": 2}, "disk.path", "missing, but disk.io_threads is given"),
        ({"disk": {"path": "/d", "capacity": "50%"}}, "disk.capacity", "unknown unit '%'"),
        ({"disk": {"path": "/d", "capacity": "2TiB"}}, "disk.capacity", "file system of /d"),
        ({"disk": {"path": "d", "capacity": "1GiB"}}, "disk.path", "not absolute"),
    ],
)
def test_what_is_wrong_is_named(overrides: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load(overrides)
    assert caught.value.path == path


@pytest.mark.parametrize(
    "value", [KEY, f"file:{KEY}", f"env:{KEY}", f"command:'{KEY}", f"env:A\n{KEY}", {"key": KEY}]
)
def test_a_key_in_the_place_of_its_source_is_not_repeated(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"disk": {"path": "/d", "capacity": "1GiB", "encryption": value}})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "means"),
    [
        ("none", "none"),
        ("file:/etc/keys", "file:/etc/keys"),
        ("file:~/keys", f"file:{Path.home()}/keys"),
        ("env:DISK_KEYS", "env:DISK_KEYS"),
        ("command:vault kv get -field=keys a:b", "command:vault kv get -field=keys a:b"),
    ],
)
def test_sources_of_keys(value: str, means: str) -> None:
    part = load({"disk": {"path": "/d", "capacity": "1GiB", "encryption": value}}).tier("disk")
    assert part is not None
    assert part.encryption == means


@pytest.mark.parametrize("path", sorted(OPTIONS))
@pytest.mark.parametrize("value", [None, [], {}, 1.5, False, "", object()])
def test_no_option_takes_a_value_of_another_kind(path: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load({**SAMPLES, path: value})
    assert caught.value.path == path
    assert f"expected {OPTIONS[path].kind.expected} (override)" in caught.value.problem


def test_a_wrong_value_names_its_source(tmp_path: Path) -> None:
    file = tmp_path / "kv.yml"
    file.write_text("host: {capacity: 8G}")
    with pytest.raises(ConfigError, match=f"\\(file {file}\\)"):
        load(file=file)
    with pytest.raises(ConfigError, match=r"\(environment variable KVSTRATA_HOST_CAPACITY\)"):
        load(environ={"KVSTRATA_HOST_CAPACITY": "8G"})


def test_unknown_variables_are_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean KVSTRATA_HOST_CAPACITY"):
        load(environ={"KVSTRATA_HOST_CAPCITY": "1GiB"})
    with pytest.raises(ConfigError, match="expected one of KVSTRATA_NODE"):
        load(environ={"KVSTRATA_": ""})


def test_other_variables_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "kv.yaml").write_text("")
    environ = {**dict.fromkeys(OTHER_VARIABLES, "x"), "KVSTRATA_CONFIG": f"{tmp_path}/kv.yaml"}
    kubernetes = {
        "KVSTRATA_SERVICE_HOST": "10.0.0.1",
        "KVSTRATA_SERVICE_PORT": "9000",
        "KVSTRATA_NODE_SERVICE_PORT_METRICS": "9000",
        "KVSTRATA_PORT": "tcp://10.0.0.1:9000",
        "KVSTRATA_PORT_9000_TCP": "tcp://10.0.0.1:9000",
        "KVSTRATA_PORT_9000_TCP_ADDR": "10.0.0.1",
    }
    assert load(environ={**environ, **kubernetes, "PATH": "/bin"}).sources == {}
    with pytest.raises(ConfigError, match="unknown environment variable"):
        load(environ={"KVSTRATA_PORT": "9000"})


def test_variables_are_distinct() -> None:
    names = {option.variable for option in OPTIONS.values()}
    assert len(names) == len(OPTIONS)
    assert names.isdisjoint(OTHER_VARIABLES)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.toml", b"x = ", "is no valid toml"),
        ("a.toml", b"tenant = 'a'\ntenant = 'b'", "is no valid toml"),
        ("a.toml", b"\xff", "is no valid toml"),
        ("a.yaml", b"tenant: a\ntenant: b", "'tenant' is given twice"),
        ("a.yaml", b"host: {policy: lru, policy: cost}", "'policy' is given twice"),
        ("a.yaml", b"x: [", "is no valid yaml"),
        ("a.yaml", b"!!python/object/apply:os.getcwd []", "is no valid yaml"),
        ("a.yaml", b"[1]", "expected keys and values"),
        ("a.ini", b"", "ends in .toml, .yaml or .yml"),
        ("a.toml", None, "cannot be read: No such file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load(file=file)
    assert caught.value.path == str(file)


sizes = st.integers(1 << 20, 60 * GIB)
shares = st.integers(1, 9999).map(lambda n: f"{n / 100:.2f}%")
durations = st.integers(1, 10**9).map(lambda n: f"{n}us")
values: Mapping[str, st.SearchStrategy[Any]] = {
    "chunk_tokens": st.integers(1, 256).map(lambda n: 16 * n),
    "tenant": st.text(min_size=1, max_size=20).filter(str.isprintable),
    "secret_file": st.text(min_size=1).filter(str.isprintable).map(lambda name: f"/s/{name}"),
    "linger": durations,
    "host.capacity": sizes | shares,
    "host.policy": st.sampled_from(sorted(POLICIES)),
    "disk.path": st.text(min_size=1).filter(str.isprintable).map(lambda name: f"/d/{name}"),
    "disk.capacity": sizes,
    "disk.scrub_rate": st.integers(0, GIB).map(lambda n: f"{n}B/s"),
    "deadlines.load": durations,
    "leases.total": st.integers(50, 100).map(lambda n: f"{n}%"),
}
some_values = st.fixed_dictionaries(
    {}, optional={path: value for path, value in values.items() if not path.startswith("disk")}
) | st.fixed_dictionaries(dict(values))


@given(some_values)
def test_what_is_printed_loads_as_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, flat: dict[str, Any]
) -> None:
    config = load(flat)
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    file.write_text(effective(config), encoding="utf-8")
    assert read_file(file) == config.to_dict()
    assert load(file=file) == config
    assert load(config.to_dict()) == config
    assert load(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_capacity_in_bytes() -> None:
    assert host_capacity_bytes(load({"host.capacity": "25%"}), 1_000_001) == 61 * 4096
    assert host_capacity_bytes(load({"host.capacity": (1 << 20) + 5}), 1) == 1 << 20
    both = load({"host.capacity": "50%", "memory.capacity": "2GiB"})
    assert host_capacity_bytes(both, 6 * GIB) == 2 * GIB
    with pytest.raises(ConfigError, match="2GiB of 2GiB leaves nothing for the pool"):
        host_capacity_bytes(both, 2 * GIB)


def test_paths_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load({"secret_file": "~/a/../b"}).secret_file == tmp_path / "b"
    assert load({"node": "unix:~/n.sock"}).node == f"unix:{tmp_path}/n.sock"
    assert load().secret_file == tmp_path / ".config/kvstrata/secret"
    assert load(environ={"XDG_CONFIG_HOME": "/xdg"}).secret_file == Path("/xdg/kvstrata/secret")


def test_identity_covers_the_nodes_options_and_no_others() -> None:
    base = {
        "disk.path": "/d",
        "disk.capacity": "1GiB",
        "disk.load_target": "1s",
        "memory.capacity": "1GiB",
        "peer.nodes": "b:1",
        **{f"network.{name}": "/x.pem" for name in ("certificate", "key", "authority")},
        **{f"api.tls_{name}": "/x.pem" for name in ("certificate", "key")},
        "redis.url": "redis://h",
        "redis.load_target": "1s",
        "mooncake.master": "m:1",
        "mooncake.load_target": "1s",
        "object_store.url": "s3://other",
        "object_store.capacity": "1GiB",
        "object_store.load_target": "1s",
    }
    identity = load(base).node_identity(uid=1)
    clients = {
        "node", "chunk_tokens", "tenant", "log", "hints", "inside", "meet", "blend", "reset",
        "share",
    }  # fmt: skip
    for path, value in SAMPLES.items():
        given = dict(base)
        if path == "network.transport":
            given["network.trusted"] = SAMPLES["network.trusted"]
        before = load(given).node_identity(uid=1)
        other = load({**given, path: value}).node_identity(uid=1)
        is_client = path in clients or path.startswith(("deadlines.", "api."))
        assert (other == before) == is_client, path
    assert load().node_identity(uid=1) != identity
    assert load(base).node_identity(uid=2) != identity
    assert load({**base, "host.capacity": "20.0%"}).node_identity(uid=1) == identity


def test_socket_path(tmp_path: Path) -> None:
    assert socket_path(load({"node": "unix:/run/n.sock"})) == Path("/run/n.sock")
    config, uid = load(), os.getuid()
    name = f"{config.node_identity()}-{PROTOCOL_VERSION}.sock"
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert socket_path(config, environ) == tmp_path / "kvstrata" / name
    fallback = tmp_path / f"kvstrata-{uid}" / name
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for folder in (None, "relative", f"{tmp_path}/missing", str(long)):
        environ = {} if folder is None else {"XDG_RUNTIME_DIR": folder}
        assert socket_path(config, environ, temporary=tmp_path) == fallback
    assert list(tmp_path.iterdir()) == [long], "nothing is created"


def test_a_strangers_socket_folder_is_refused(tmp_path: Path) -> None:
    stranger = os.getuid() + 1
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    other = socket_path(load(), environ, uid=stranger, temporary=tmp_path / "t")
    assert other.parent == tmp_path / f"t/kvstrata-{stranger}", "a stranger's XDG folder is passed"
    (tmp_path / f"kvstrata-{stranger}").mkdir()
    with pytest.raises(ConfigError, match="is not a folder of user"):
        socket_path(load(), {}, uid=stranger, temporary=tmp_path)
    (tmp_path / f"kvstrata-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of user"):
        socket_path(load(), {}, temporary=tmp_path)


def test_machine_is_measured(tmp_path: Path) -> None:
    assert file_system_bytes(tmp_path / "not/there") == file_system_bytes(tmp_path) > 0
    with pytest.raises(ConfigError, match="memory this machine has"):
        load_config(environ={}, overrides={"host.capacity": "9000TiB"})
    with pytest.raises(ConfigError, match="more than the file system"):
        load_config(
            environ={}, overrides={"disk.path": str(tmp_path), "disk.capacity": "900000TiB"}
        )


def test_an_unknown_file_system_size_is_not_held_against_it() -> None:
    overrides = {"disk.path": "/d", "disk.capacity": "900TiB"}
    assert load_config(environ={}, overrides=overrides, disk_bytes=lambda path: 0).tier("disk")


def test_the_page_is_what_the_code_says() -> None:
    script = ROOT / "scripts" / "generate_configuration.py"
    spec = importlib.util.spec_from_file_location("generate_configuration", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == module.page(), "stale: run scripts/generate_configuration.py"
    for option in OPTIONS.values():
        assert option.variable in page


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    for name in [name for name in os.environ if name.startswith("KVSTRATA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.argv", ["kvstrata", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_command_prints_what_loads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kv.yaml"
    file.write_text("tenant: acme")
    arguments = ("config", "-c", str(file), "--set", "host.capacity=2MiB", "-s", "chunk_tokens=64")
    assert run_command(monkeypatch, *arguments) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    want = {"tenant": "acme", "host.capacity": 2 << 20, "chunk_tokens": 64}
    assert load(file=printed) == load(want)
    assert run_command(monkeypatch, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"] == load(want).to_dict()
    assert answer["sources"]["tenant"] == "file"
    assert answer["host_capacity_bytes"] == 2 << 20
    assert answer["socket"].endswith(".sock")


@pytest.mark.parametrize("setting", ["host.capacity=9", "host.capacity", "nope=1"])
def test_command_tells_an_error_in_one_line(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "config", "--set", setting) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"kvstrata: {setting.partition('=')[0]}: ")
    assert captured.err.count("\n") == 1


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("kvstrata ")


def test_what_is_shared_is_nothing_by_default_and_named_one_by_one() -> None:
    assert load().share == ()
    for given_as in ("ranks", " ranks ", ["ranks"]):
        assert load({"share": given_as}).share == ("ranks",)
    assert load(environ={"KVSTRATA_SHARE": "none"}).share == ()
    assert load({"share": "engines"}).share == ("engines",)
    for given_as in ("engines, ranks", "ranks,engines"):
        assert {*load({"share": given_as}).share} == {"engines", "ranks"}
    for wrong in ("", "nodes", "all", "ranks, engines, ranks", [], ["none"], True):
        with pytest.raises(
            ConfigError, match='expected "none", or some of engines, ranks'
        ) as caught:
            load({"share": wrong})
        assert caught.value.path == "share"
