"""What `kvtc` knows of a model: the artefact that ``kvstrata calibrate`` makes, and where it lies.

A file, numbers little endian::

    "KVTC" | uint32 version 1 | uint32 bytes of the header | header | arrays | fingerprint

The header is JSON: `Header`. The arrays fill the rest: frequencies float64 (L, D/2); mean float32
and weight float32, (L, 2, H * D) each; basis float16 (L, 2, G, W, W). The fingerprint is the first
16 bytes of the blake3 of all before it; what was encoded with an artefact names it by that.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstrata.codecs.elements import Floats
from kvstrata.errors import CorruptObject, Incompatible, UsageError

FINGERPRINT_BYTES = 16
MAX_GROUP = 256
"""The most channels that one transform spans; with more, its cost would outgrow its gain."""

_MAGIC = b"KVTC"
_VERSION = 1
_PREFIX = 12
_MAX_FILE = 1 << 30
_SUFFIX = ".kvtc"


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the artefact is of, in the file's own words.

    ``layers``, ``heads``, ``dim``: L, H, D of the KV. ``group``: heads in one transform. ``steps``:
    the width of a quantiser's bin by level, a level being a number of half bits per element.
    """

    model: str
    layers: int
    heads: int
    dim: int
    group: int
    tokens: int
    steps: dict[str, float]

    @property
    def levels(self) -> list[int]:
        """From the fewest bits to the most."""
        return sorted(map(int, self.steps))


@dataclass(frozen=True, eq=False)
class Calibration:
    """One model's transform. Two are equal if their fingerprints are.

    A layer's state x (H * D, keys turned back to position 0) has the coefficients
    ``basis.T @ (weight * (x - mean))``, group by group, in which an error of one size does the
    same damage to the model's next-token distribution wherever it falls.

    Args:
        header: model, shape, levels.
        frequencies: float64 (L, D/2), radians a token.
        mean, weight: float32 (L, 2, H * D).
        basis: float16 (L, 2, G, W, W), W = group * D, columns orthonormal, most variance first.
    """

    header: Header
    frequencies: npt.NDArray[np.float64]
    mean: Floats
    weight: Floats
    basis: npt.NDArray[np.float16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes."""
        return _digest(self._body())

    @cached_property
    def components(self) -> Floats:
        """The basis with a component a row: float32 (L, 2, G, W, W), C-contiguous."""
        return np.ascontiguousarray(self.basis.swapaxes(-1, -2).astype(np.float32))

    @cached_property
    def layer_frequencies(self) -> list[bytes]:
        """Of each layer, as `kvstrata.codecs.rope.angles` takes them."""
        return [row.tobytes() for row in self.frequencies]

    def save(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(self._body() + self.fingerprint)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _body(self) -> bytes:
        text = msgspec.json.encode(self.header, order="deterministic")
        numbers = (_VERSION.to_bytes(4, "little"), len(text).to_bytes(4, "little"))
        arrays = [
            np.ascontiguousarray(getattr(self, name).astype(dtype, copy=False)).tobytes()
            for name, dtype, _ in _arrays(self.header)
        ]
        return b"".join([_MAGIC, *numbers, text, *arrays])


def folder() -> Path:
    """Where artefacts are looked for: ``kvstrata/calibrations`` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvstrata" / "calibrations"


def default_path(calibration: Calibration) -> Path:
    """Where `find` looks for it: the file is named by its fingerprint."""
    return folder() / f"{calibration.fingerprint.hex()}{_SUFFIX}"


def load(path: Path) -> Calibration:
    """Read an artefact, check it, and make it known to this process.

    Raises:
        UsageError: the file cannot be read.
        CorruptObject: it is not what `Calibration.save` writes.
        Incompatible: it is of another version.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read the calibration {path}: {error}") from error
    calibration = decode(data)
    register(calibration)
    return calibration


_known: dict[bytes, Calibration] = {}
_lock = threading.Lock()


def register(calibration: Calibration) -> None:
    """Make it known to this process, so that what was encoded with it can be decoded."""
    with _lock:
        _known[calibration.fingerprint] = calibration


def find(fingerprint: bytes) -> Calibration:
    """The artefact of this fingerprint: known to the process, or in `folder`.

    Raises:
        Incompatible: there is none.
        CorruptObject, UsageError: as `load`.
    """
    if fingerprint not in _known:
        path = folder() / f"{fingerprint.hex()}{_SUFFIX}"
        if not path.is_file():
            raise Incompatible(
                f"no calibration {fingerprint.hex()} in {folder()}: copy it there from where this "
                "was encoded; `kvstrata calibrate MODEL` makes a new one, for new objects"
            )
        if load(path).fingerprint != fingerprint:
            raise CorruptObject(f"{path} holds another calibration")
    return _known[fingerprint]


def stored() -> list[Calibration]:
    """Those in `folder`, by fingerprint; what is damaged is left out, as `find` says why."""
    found = []
    for path in sorted(folder().glob(f"*{_SUFFIX}")):
        try:
            found.append(find(bytes.fromhex(path.stem)))
        except (CorruptObject, Incompatible, UsageError, ValueError):
            continue
    return found


def decode(data: bytes) -> Calibration:
    """Read the bytes of a file; errors are those of `load`."""
    if len(data) < _PREFIX + FINGERPRINT_BYTES or data[:4] != _MAGIC:
        raise CorruptObject("no calibration: it does not begin like one")
    if (version := int.from_bytes(data[4:8], "little")) != _VERSION:
        raise Incompatible(f"a calibration of version {version}, not {_VERSION}")
    body, fingerprint = data[:-FINGERPRINT_BYTES], data[-FINGERPRINT_BYTES:]
    if len(data) > _MAX_FILE or _digest(body) != fingerprint:
        raise CorruptObject("the calibration is damaged: its checksum is another")
    end = _PREFIX + int.from_bytes(data[8:12], "little")
    try:
        header = msgspec.json.decode(body[_PREFIX:end], type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptObject(f"the calibration's header: {error}") from error
    _check_header(header)
    arrays = {}
    for name, dtype, shape in _arrays(header):
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        if end > len(body):
            raise CorruptObject("the calibration ends in the middle of its numbers")
        arrays[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    if end != len(body):
        raise CorruptObject("the calibration has more bytes than numbers")
    calibration = Calibration(header, **arrays)
    _check_numbers(calibration)
    return calibration


def _digest(body: bytes) -> bytes:
    return blake3(body).digest(length=FINGERPRINT_BYTES)


def _arrays(header: Header) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each array, in the order of the file."""
    layers, width = header.layers, header.heads * header.dim
    group = header.group * header.dim
    return [
        ("frequencies", "<f8", (layers, header.dim // 2)),
        ("mean", "<f4", (layers, 2, width)),
        ("weight", "<f4", (layers, 2, width)),
        ("basis", "<f2", (layers, 2, width // group, group, group)),
    ]


def _check_header(header: Header) -> None:
    sizes = (header.layers, header.heads, header.dim, header.group)
    if min(sizes) < 1 or max(sizes) > 4096 or header.dim % 2 or header.heads % header.group:
        raise CorruptObject(f"the calibration is of no shape: {sizes}")
    for level, step in header.steps.items():
        if level not in map(str, range(1, 33)) or not 1e-30 < step < 1e30:
            raise CorruptObject(f"the calibration has the level {level!r} with step {step}")


def _check_numbers(calibration: Calibration) -> None:
    for name, limit in (("frequencies", 1e3), ("mean", 1e15), ("weight", 1e15), ("basis", 1.1)):
        if not (np.abs(getattr(calibration, name)) <= limit).all():
            raise CorruptObject(f"the calibration's {name} is out of bounds")
    if not (calibration.weight > 1e-15).all():
        raise CorruptObject("the calibration's weight is not above zero")
