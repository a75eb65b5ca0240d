"""The artefact of `kvtc`: what is saved comes back, what is damaged does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.codecs import calibration as artefacts
from kvstrata.codecs.calibration import Calibration, Header, decode, find, load
from kvstrata.codecs.kvtc_fit import Fit
from kvstrata.errors import CorruptObject, Incompatible, UsageError


def small(steps: dict[str, float] | None = None) -> Calibration:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(0, 1, (2, 2, 1, 8, 8)))[0]
    return Calibration(
        Header("small", 2, 2, 4, 2, 1000, steps or {"4": 0.25, "11": 0.01}),
        np.array([[1.0, 0.1]] * 2),
        rng.normal(0, 1, (2, 2, 8)).astype(np.float32),
        rng.uniform(0.5, 2, (2, 2, 8)).astype(np.float32),
        basis.astype(np.float16),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("calibration") / "one"
    small().save(path)
    return path.read_bytes()


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return body + blake3(body).digest(length=16)


def test_it_comes_back(tmp_path: Path) -> None:
    one, path = small(), tmp_path / "deep" / "file"
    one.save(path)
    back = load(path)
    assert back == one
    assert back.header == one.header
    for name in ("frequencies", "mean", "weight", "basis"):
        assert (getattr(back, name) == getattr(one, name)).all()
    assert [child.name for child in path.parent.iterdir()] == ["file"]
    assert small({"4": 0.26}) != one


def test_it_is_found_by_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(artefacts, "_known", {})
    one, other = small({"2": 1.0}), small({"2": 2.0})
    with pytest.raises(Incompatible, match="kvstrata calibrate"):
        find(one.fingerprint)
    one.save(artefacts.default_path(one))
    assert find(one.fingerprint) == one
    # Under the name of another it does not pass for it.
    one.save(artefacts.default_path(other))
    with pytest.raises(CorruptObject):
        find(other.fingerprint)
    (artefacts.folder() / "nonsense.kvtc").write_bytes(b"nonsense")
    assert artefacts.stored() == [one]


@settings(deadline=None)
@given(st.data())
def test_damage_is_noticed(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    for bad in (
        data[:at],
        data[:at] + bytes([data[at] ^ (1 << draw.draw(st.integers(0, 7)))]) + data[at + 1 :],
        data + data[at:],
    ):
        with pytest.raises((CorruptObject, Incompatible)):
            decode(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"layers": 3},
        {"layers": 1 << 40},
        {"dim": 3},
        {"group": 0},
        {"heads": 3},
        {"heads": -2},
        {"steps": {"4": 0.0}},
        {"steps": {"4": 1e300}},
        {"steps": {"0": 1.0}},
        {"steps": {"x": 1.0}},
        {"model": 7},
        {"more": 7},
    ],
)
def test_headers_that_lie(data: bytes, change: dict[str, object]) -> None:
    size = int.from_bytes(data[8:12], "little")
    header = msgspec.json.decode(data[12 : 12 + size]) | change
    text = msgspec.json.encode(header)
    rest = data[12 + size : -16]
    with pytest.raises(CorruptObject):
        decode(sealed(data[:8] + len(text).to_bytes(4, "little") + text + rest))


@pytest.mark.parametrize("number", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("back", [-1, -600])
def test_numbers_out_of_bounds(data: bytes, number: float, back: int) -> None:
    body = bytearray(data[:-16])
    at = len(body) - 4 * 64 * 2 - 4  # the last of the weights
    body[at : at + 4] = np.float32(number).tobytes()
    with pytest.raises(CorruptObject, match="weight"):
        decode(sealed(bytes(body)))


def test_another_version(data: bytes) -> None:
    with pytest.raises(Incompatible, match="version 2"):
        decode(data[:4] + b"\2" + data[5:])


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none")


def test_too_few_tokens_to_fit() -> None:
    fit = Fit("x", np.ones((1, 4)), 1)
    ones = np.ones((1, 2, 1, 10, 8), np.float32)
    fit.add(ones, [ones], 0)
    with pytest.raises(UsageError, match="10 tokens"):
        fit.finish()
