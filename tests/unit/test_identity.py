"""Models are told apart by their bytes, and a remembered hash is never a stale one."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstrata import identity
from kvstrata.errors import ConfigError, UsageError
from kvstrata.identity import (
    adapter_identity,
    changed_since,
    model_fingerprint,
    weights_identity,
)

GOLDEN_WEIGHTS = "7c65e43b2fe47fa8c32b7c2337ee8cf360d10603517c7efd72b4b3b7fee07bc2"
GOLDEN_ADAPTER = "c4ef208378583d28a69c9e40afb43d3063917d79c8cdfe6fa9fd8dd5f63193e1"


def later() -> int:
    """A clock for which every file has been still for a minute, so hashes are remembered."""
    return time.time_ns() + 60_000_000_000


def make_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each hash that is really made."""
    made: list[int] = []

    def counting(*data: bytes) -> blake3:
        if not data:  # a file's hash starts empty, a text's does not
            made.append(1)
        return blake3(*data)

    monkeypatch.setattr("kvstrata.identity.blake3", counting)
    return made


def test_a_file_that_changes_cannot_hide_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    file = model / "model.safetensors"
    loaded_at = file.stat().st_ctime_ns
    assert changed_since(model, loaded_at) == changed_since(file, loaded_at) == ""
    time.sleep(0.05)  # file systems' clocks tick coarsely
    (model / "config.json").write_text('{"no": "weights"}')
    assert changed_since(model, loaded_at) == ""
    file.write_bytes(b"others!")
    os.utime(file, ns=(loaded_at, loaded_at))
    assert changed_since(model, loaded_at) == changed_since(file, loaded_at) == file.name
    with pytest.raises(ConfigError):
        changed_since(tmp_path / "nothing", loaded_at)


def test_golden(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert weights_identity(model, None) == GOLDEN_WEIGHTS
    (model / "adapter_config.json").write_text('{"r": 8}')
    assert weights_identity(model, None) == GOLDEN_WEIGHTS
    assert adapter_identity(model, None) == GOLDEN_ADAPTER


def test_fine_tunes_in_equally_named_folders_never_share(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one = make_model(tmp_path / "alice" / "tuned", b"weights of alice")
    two = make_model(tmp_path / "bob" / "tuned", b"weights of bob..")
    same = make_model(tmp_path / "carol" / "moved", b"weights of alice")
    found = [weights_identity(folder, cache, clock=later) for folder in (one, two, same)]
    assert found[0] != found[1]
    assert found[0] == found[2]  # a copy is the same model, wherever it lies
    prints = [model_fingerprint({"hidden_size": 576}, weights) for weights in found]
    assert prints[0] != prints[1]


def test_weights_replaced_in_place_with_the_same_size(tmp_path: Path, reads: list[int]) -> None:
    model, cache = make_model(tmp_path / "model", b"version one"), tmp_path / "cache"
    file = model / "model.safetensors"
    before = weights_identity(model, cache, clock=later)
    assert weights_identity(model, cache, clock=later) == before
    assert len(reads) == 1
    status = file.stat()
    new_ctime(file, lambda: file.write_bytes(b"version two"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # mtime can be set back
    assert file.stat().st_size == status.st_size
    assert file.stat().st_ino == status.st_ino
    assert weights_identity(model, cache, clock=later) != before
    assert len(reads) == 2


def new_ctime(file: Path, change: Any) -> None:
    """Change a file until the file system's coarse clock has ticked."""
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:
        change()


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path: Path, reads: list[int]) -> None:
    model, cache = make_model(tmp_path / "model"), tmp_path / "cache"
    changed = (model / "model.safetensors").stat().st_ctime_ns
    for age_ns, expected in ((-(10**12), 1), (10**9, 2), (3 * 10**9, 3), (3 * 10**9, 3)):
        weights_identity(model, cache, clock=partial(int, changed + age_ns))
        assert len(reads) == expected


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    expected = weights_identity(model, None)
    stamps = iter([(1, 0, 9, 0, 0), (2, 0, 9, 0, 0), (2, 0, 9, 0, 0), (2, 0, 9, 0, 0)])
    monkeypatch.setattr(identity, "_stamp", lambda status: next(stamps))
    assert weights_identity(model, None) == expected  # the second reading was steady
    assert next(stamps, None) is None
    ticks = count()
    monkeypatch.setattr(identity, "_stamp", lambda status: (next(ticks), 0, 9, 0, 0))
    with pytest.raises(ConfigError, match=r"model\.safetensors: changes while it is read"):
        weights_identity(model, None)


def test_names_and_all_files_count(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    seen = [weights_identity(model, None)]
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    seen.append(weights_identity(model, None))
    (model / "extra").mkdir()
    (model / "extra" / "more.bin").write_bytes(b"more")
    seen.append(weights_identity(model, None))
    (model / "modeling.py").write_text("scale = 2")
    seen.append(weights_identity(model, None))
    assert len(set(seen)) == 4
    (model / "README.md").write_text("no weights here")
    (model / "config.json").write_text('{"seen by": "model_fingerprint"}')
    assert weights_identity(model, None) == seen[-1]


def test_links_are_followed_and_a_circle_ends(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "9c1e").write_bytes(b"weights")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blobs / "9c1e")
    (snapshot / "again").symlink_to(snapshot)
    assert weights_identity(snapshot, None) == GOLDEN_WEIGHTS


def test_files_and_several_paths(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    file = model / "model.safetensors"
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    assert weights_identity(file, None) == weights_identity(model, None) == GOLDEN_WEIGHTS
    both = weights_identity([file, other], None)
    assert both == weights_identity([str(other), str(file)], None)
    assert both not in (weights_identity(file, None), weights_identity(other, None))


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "holds no weights"), (tmp_path / "no", "no")):
        with pytest.raises(ConfigError, match=message):
            weights_identity(path, None)
    with pytest.raises(ConfigError, match="no path was given"):
        weights_identity([], None)


def test_adapter_counts_its_configuration(tmp_path: Path) -> None:
    adapter = make_model(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 16}')
    before = adapter_identity(adapter, None)
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert adapter_identity(adapter, None) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\xff\x00not a line",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"', b"'"),
        lambda content: content[:-4] + b"0" + content[-3:],
    ],
    ids=["empty", "noise", "cut", "quotes", "flipped"],
)
def test_a_damaged_memory_is_rebuilt(tmp_path: Path, reads: list[int], damage: Any) -> None:
    model, cache = make_model(tmp_path / "model"), tmp_path / "cache"
    weights_identity(model, cache, clock=later)
    good = cache.read_bytes()
    bad = damage(good)
    assert bad != good
    cache.write_bytes(bad)
    assert weights_identity(model, cache, clock=later) == GOLDEN_WEIGHTS
    assert len(reads) == 2
    assert cache.read_bytes() == good


def test_one_bad_line_costs_only_itself(tmp_path: Path, reads: list[int]) -> None:
    cache = tmp_path / "cache"
    models = [make_model(tmp_path / name, name.encode()) for name in "abc"]
    expected = [weights_identity(model, cache, clock=later) for model in models]
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    cache.write_bytes(lines[0] + lines[1].replace(b"[", b"(") + lines[2])
    assert [weights_identity(model, cache, clock=later) for model in models] == expected
    assert len(reads) == 4


def test_a_memory_that_cannot_be_kept_only_costs_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "file").touch()
    assert weights_identity(model, tmp_path / "file" / "cache", clock=later) == GOLDEN_WEIGHTS
    assert "not remembered" in caplog.text
    assert weights_identity(model, tmp_path, clock=later) == GOLDEN_WEIGHTS
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "file"}


def test_concurrent_writers_leave_a_whole_memory(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    models = [make_model(tmp_path / f"model{number}", b"%d" % number) for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda model: weights_identity(model, cache, clock=later), models))
    assert found == [weights_identity(model, None) for model in models]
    lines = cache.read_text().splitlines()
    assert lines
    for line in lines:
        path, *stamp, digest = json.loads(line.split(" ", 1)[1])
        assert Path(path).exists()
        assert [len(stamp), len(digest)] == [5, 64]
    assert [entry.name for entry in tmp_path.glob("*.tmp")] == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=2), values), st.dictionaries(st.text(max_size=2), values))
def test_fingerprints_meet_only_if_configurations_do(one: Any, other: Any) -> None:
    same = repr(sort_deep(one)) == repr(sort_deep(other))
    assert (model_fingerprint(one, "w") == model_fingerprint(other, "w")) == same
    assert model_fingerprint(one, "w") == model_fingerprint(dict(reversed(one.items())), "w")
    assert model_fingerprint(one, "w") != model_fingerprint(one, "v")


def sort_deep(value: Any) -> Any:
    """The same with dictionaries as sorted lists of pairs, marked so that no list equals one."""
    if isinstance(value, dict):
        return ("dict", sorted((key, sort_deep(item)) for key, item in value.items()))
    return [sort_deep(item) for item in value] if isinstance(value, list) else value


def test_a_round_trip_through_json_changes_no_fingerprint() -> None:
    config = {"id2label": {0: "a", 1: "b"}, "sizes": (1, 2), "limit": [0.0, float("inf")]}
    again = json.loads(json.dumps(config))
    assert model_fingerprint(config, "w") == model_fingerprint(again, "w")
    assert model_fingerprint({"x": float("nan")}, "w") != model_fingerprint({"x": "NaN"}, "w")
    assert model_fingerprint({"x": True}, "w") != model_fingerprint({"x": 1}, "w")


class Kind(str, Enum):
    ROPE = "rope"


def test_texts_and_numbers_of_other_types_count_as_what_they_are() -> None:
    plain = model_fingerprint({"kind": "rope", "theta": 1e5}, "w")
    assert model_fingerprint({"kind": Kind.ROPE, "theta": np.float64(1e5)}, "w") == plain


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dtype": np.dtype("float16")}, r"config\.dtype: a .*DType.* has no JSON form"),
        ({"a": [0, {"b": {1, 2}}]}, r"config\.a\[1\]\.b: a set has no JSON form"),
        ({"a": object()}, r"config\.a: a object"),
        ({"a": {True: 1}}, r"config\.a: key True is neither"),
        ({"a": {1.5: 1}}, r"config\.a: key 1\.5 is neither"),
        ({"a": {1: "x", "1": "y"}}, r"config\.a: the keys '1' and 1 are one in JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_one_json_form_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_fingerprint(config, "w")


def test_endless_and_nameless_are_refused() -> None:
    config: dict[str, Any] = {}
    config["self"] = config
    with pytest.raises(UsageError, match="nested too deeply, or in itself"):
        model_fingerprint(config, "w")
    with pytest.raises(UsageError, match="weights is empty"):
        model_fingerprint({}, "")
