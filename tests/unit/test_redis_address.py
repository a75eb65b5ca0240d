"""Where a Redis is: one URL, read strictly; its password is never printed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from kvstrata import cli
from kvstrata.config import Config, RedisConfig, effective, load_config
from kvstrata.config.files import read_file
from kvstrata.errors import ConfigError
from kvstrata.tiers.redis.address import Address, Place, parse_address

SECRET = "hunter2"
LOCAL = (Place("h", 6379),)


def load(url: object, **options: object) -> Config:
    overrides = {"redis": {"url": url, **options}}
    return load_config(environ={}, overrides=overrides, memory_bytes=1 << 40)


def part(config: Config) -> RedisConfig:
    (found,) = config.tiers
    assert isinstance(found, RedisConfig)
    return found


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address(LOCAL)),
        ("redis://h/", Address(LOCAL)),
        ("redis://h:6379/0", Address(LOCAL)),
        ("redis://h:7/3", Address((Place("h", 7),), db=3)),
        ("redis://[::1]:7", Address((Place("::1", 7),))),
        ("redis://kv@h", Address(LOCAL, user="kv")),
        ("redis://:pw@h", Address(LOCAL, password="pw")),
        ("redis://kv:p%40%2F%3A%25@h", Address(LOCAL, user="kv", password="p@/:%")),
        ("rediss://h", Address(LOCAL, tls=True)),
        (
            "rediss://h?ca_file=/a/b.pem",
            Address(LOCAL, tls=True, files=(("ca_file", "/a/b.pem"),)),
        ),
        (
            "rediss://h/1?key_file=/k&cert_file=/c%20c",
            Address(LOCAL, tls=True, db=1, files=(("cert_file", "/c c"), ("key_file", "/k"))),
        ),
        ("redis+cluster://h", Address(LOCAL, cluster=True)),
        (
            "rediss+cluster://u:p@h:1,[::2]:3,g",
            Address(
                (Place("h", 1), Place("::2", 3), Place("g", 6379)),
                cluster=True, tls=True, user="u", password="p",
            ),
        ),
    ],
)  # fmt: skip
def test_urls(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(address.url) == address


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (7, "no text"),
        (f"redis://:{SECRET}\n@h", "no text"),
        ("", "begins with none of redis://"),
        (f"kv:{SECRET}@h", "begins with none of"),
        (f"http://:{SECRET}@h", "begins with none of"),
        (f"redis://kv:{SECRET}@", "no host"),
        (f"redis://kv:{SECRET}@h:0", "no host, or a port"),
        (f"redis://kv:{SECRET}@h:", "no host, or a port"),
        (f"redis://kv:{SECRET}@h:65536", "no host, or a port"),
        (f"redis://kv:{SECRET}/x@h", "in a password / is written %2F"),
        (f"redis://kv:{SECRET}@x@h", "more than one @"),
        (f"redis://kv:{SECRET}@h#x", "there is a # in it"),
        (f"redis://kv:{SECRET}@h/x", "no number of a database"),
        (f"redis://kv:{SECRET}@h/1/2", "no number of a database"),
        (f"redis://kv:{SECRET}@a,b", "several hosts are for a cluster"),
        (f"redis+cluster://kv:{SECRET}@a,,b", "no host"),
        (f"redis+cluster://kv:{SECRET}@a/1", "no numbered databases"),
        (f"redis://kv:{SECRET}@h?ca_file=/x", "files are for TLS"),
        (f"rediss://kv:{SECRET}@h?password={SECRET}", "is not ca_file, cert_file, key_file"),
        (f"rediss://kv:{SECRET}@h?{SECRET}", "is not ca_file, cert_file, key_file"),
        (f"rediss://kv:{SECRET}@h?ca_file=/a&ca_file=/b", "each once"),
        (f"rediss://kv:{SECRET}@h?ca_file=x", "no absolute path"),
        (f"rediss://kv:{SECRET}@h?cert_file=/x", "go together"),
        ("redis://kv:***@h", "as it is printed; put the real one there"),
    ],
)
def test_what_is_wrong_with_a_url_is_said_without_it(url: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load(url)
    assert caught.value.path == "redis.url"
    assert 'expected "redis://user:password@host:6379/0"' in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "a b", "a*", "{a}", "a" * 65, "é", 7])
def test_prefixes_that_would_be_patterns_or_tags_are_refused(prefix: object) -> None:
    with pytest.raises(ConfigError, match="letters, digits") as caught:
        load("redis://h", prefix=prefix)
    assert caught.value.path == "redis.prefix"


def test_machines_read_the_password_and_people_do_not() -> None:
    config = load(f"redis://kv:{SECRET}@h")
    assert config.to_dict()["redis"]["url"] == f"redis://kv:{SECRET}@h:6379"
    assert load_config(environ={}, overrides=config.to_dict()) == config
    assert part(pickle.loads(pickle.dumps(config))).url.password == SECRET
    shown = [
        effective(config),
        json.dumps(config.shown()),
        repr(config),
        str(part(config).url),
        repr(part(config)),
    ]
    for text in shown:
        assert SECRET not in text
    assert 'url = "redis://kv:***@h:6379"  # override' in effective(config)
    other = load("redis://kv:another@h")
    assert other != config
    assert other.node_identity() != config.node_identity(), "they are not to share a node"


def test_what_is_printed_loads_once_its_password_is_put_in(tmp_path: Path) -> None:
    config = load(f"redis://kv:{SECRET}@h", ttl="7d")
    file = tmp_path / "printed.toml"
    file.write_text(effective(config))
    with pytest.raises(ConfigError, match="put the real one there"):
        load_config(file, environ={})
    file.write_text(effective(config).replace("***", SECRET))
    assert load_config(file, environ={}) == config
    assert read_file(file) == config.to_dict()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_no_password(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVSTRATA_REDIS_URL", f"redis://kv:{SECRET}@h")
    monkeypatch.setattr("sys.argv", ["kvstrata", "config", *["--json"] * as_json])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = "".join(capsys.readouterr())
    assert caught.value.code == 0
    assert "redis://kv:***@h:6379" in printed
    assert SECRET not in printed


def test_a_url_in_the_place_of_the_table_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="not a table of codec") as caught:
        load_config(environ={}, overrides={"redis": f"redis://:{SECRET}@h"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", f"redis:\n  url: redis://:{SECRET}@h: x"),
        ("a.yaml", f"- redis://:{SECRET}@h"),
        ("a.yaml", f'redis: {{url: "redis://:{SECRET}@h'),
        ("a.toml", f'redis.url = "redis://:{SECRET}@h'),
        ("a.toml", f"redis.url = redis://:{SECRET}@h"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_repeated(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name, environ={})
    assert SECRET not in str(caught.value)
