"""Who a model is: its effective configuration and the very bytes of its weights.

Names lie (two fine-tunes in equally named folders, weights replaced in place), so identity comes
from content. Hashing gigabytes is slow, so each file's hash is remembered beside what the file
system says about the file; a memory that is missing or damaged only costs the time again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import xxhash
from blake3 import blake3

from kvstrata.errors import ConfigError, UsageError
from kvstrata.keys import length_prefixed

logger = logging.getLogger(__name__)

AnyPath: TypeAlias = str | os.PathLike[str]
Stamp: TypeAlias = tuple[int, ...]

# Code that a checkpoint brings along changes what its weights mean.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".ggml", ".npz", ".h5", ".msgpack", ".tensors", ".onnx", ".py",
)  # fmt: skip
_ADAPTER = (*_WEIGHTS, "adapter_config.json")

_PIECE_BYTES = 8 << 20
_STILL_NS = 2_000_000_000
_ATTEMPTS = 3
_MAX_REMEMBERED = 4096


def model_fingerprint(effective_config: dict[str, Any], weights: str) -> str:
    """64 hex digits for a configuration and the weights that run under it.

    Args:
        effective_config: what the engine really uses, overrides applied. Tuples count as lists
            and whole-number keys as texts, as after a round trip through JSON.
        weights: `weights_identity`, or ``hub:<repository>@<commit>``.
    Raises:
        UsageError: weights is empty, or a value that has no one JSON form (a dtype, a set, an
            object); the message says where. Describe it by a text of your own.
    """
    if not weights:
        raise UsageError("model fingerprint: weights is empty")
    try:
        plain = _plain(effective_config, "config")
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise UsageError("config is nested too deeply, or in itself") from error
    return _hash_texts("kvstrata model 1", weights, text)


def weights_identity(
    paths: AnyPath | Iterable[AnyPath],
    cache_path: AnyPath | None,
    *,
    clock: Callable[[], int] = time.time_ns,
) -> str:
    """64 hex digits for the weights in a folder (searched to its depth), a file, or several.

    Covers the content of every weight file and its name below the given folder, not the folder's
    own name or place. Blocks while it reads, about a second a gigabyte on the first call; releases
    the GIL in between. Safe to call from several threads and processes with one cache.

    Args:
        cache_path: where hashes are remembered; None remembers nothing.
        clock: Unix time in ns.
    Raises:
        ConfigError: a path that cannot be read, holds no weights, or changes while it is read.
    """
    return _identity("kvstrata weights 1", paths, cache_path, _WEIGHTS, clock)


def adapter_identity(
    folder: AnyPath, cache_path: AnyPath | None, *, clock: Callable[[], int] = time.time_ns
) -> str:
    """64 hex digits for an adapter: its weights and its ``adapter_config.json``.

    Blocks and raises as `weights_identity`.
    """
    return _identity("kvstrata adapter 1", folder, cache_path, _ADAPTER, clock)


def changed_since(folder: AnyPath, moment_ns: int) -> str:
    """The name of a weight file that was written, replaced or moved since; empty: there is none.

    Args:
        folder: of the weights, or one file.
        moment_ns: Unix time in ns.
    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(folder)
    try:
        files = [(path.name, path)] if path.is_file() else list(_files_in(path, _WEIGHTS))
        return next((name for name, file in files if os.stat(file).st_ctime_ns > moment_ns), "")
    except OSError as error:
        raise ConfigError(str(path), f"cannot read: {error}") from error


def _identity(
    version: str,
    paths: AnyPath | Iterable[AnyPath],
    cache_path: AnyPath | None,
    suffixes: tuple[str, ...],
    clock: Callable[[], int],
) -> str:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    memory = _Memory(Path(cache_path) if cache_path is not None else None)
    found: list[tuple[str, str]] = []
    for path in map(Path, paths):
        try:
            files = [(path.name, path)] if path.is_file() else list(_files_in(path, suffixes))
            if not files:
                raise ConfigError(str(path), f"holds no weights ({', '.join(suffixes)})")
            found += [(name, _file_hash(file, memory, clock)) for name, file in files]
        except OSError as error:
            raise ConfigError(str(path), f"cannot read: {error}") from error
    if not found:
        raise ConfigError("weights", "no path was given")
    memory.save()
    # A name may hold any bytes the file system allows, so it is escaped before it is hashed.
    parts = (part for name, digest in sorted(found) for part in (ascii(name), digest))
    return _hash_texts(version, *parts)


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Weight files and their names below ``folder``; follows links, each folder once."""
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # Which of two links to one folder is followed must not vary.
        for name in files:
            if name.endswith(suffixes):
                file = Path(here, name)
                yield file.relative_to(folder).as_posix(), file


def _raise(error: OSError) -> None:
    raise error


def _stamp(status: os.stat_result) -> Stamp:
    """What changes when a file is replaced or rewritten; the last, ctime, nobody can set back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _file_hash(file: Path, memory: _Memory, clock: Callable[[], int]) -> str:
    path = os.path.realpath(file)
    for _ in range(_ATTEMPTS):
        began = clock()
        with open(path, "rb", buffering=0) as source:
            stamp = _stamp(os.fstat(source.fileno()))
            if remembered := memory.get(path, stamp):
                return remembered
            # Not memory-mapped: a file that is cut short meanwhile would kill the process.
            digest = blake3()
            piece = memoryview(bytearray(min(_PIECE_BYTES, stamp[2] + 1)))
            while size := source.readinto(piece):
                digest.update(piece[:size])
        if _stamp(os.stat(path)) == stamp:
            # The file system's clock ticks coarsely: a file changed a moment ago may change
            # again without a new stamp, so its hash is used but not remembered.
            if began - max(stamp[3], stamp[4]) > _STILL_NS:
                memory.put(path, stamp, digest.hexdigest())
            return digest.hexdigest()
    raise ConfigError(path, "changes while it is read; start when it is complete")


class _Memory:
    """Hashes of files by path and stamp, in one file of JSON lines: a checksum, then an entry.

    Lines that do not check are ignored. Saving replaces the file as a whole; of two processes
    that save at once, the later may drop what the earlier added, which costs hashing it again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries = self._load()
        self._added: dict[str, tuple[Stamp, str]] = {}

    def get(self, path: str, stamp: Stamp) -> str | None:
        known, digest = self._entries.get(path, (None, ""))
        return digest if known == stamp else None

    def put(self, path: str, stamp: Stamp, digest: str) -> None:
        self._added[path] = self._entries[path] = (stamp, digest)

    def save(self) -> None:
        if self._path is None or not self._added:
            return
        entries = {**self._load(), **self._added}
        lines = [
            _line([path, *stamp, digest])
            for path, (stamp, digest) in list(entries.items())[-_MAX_REMEMBERED:]
        ]
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, whole = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with open(descriptor, "w", encoding="ascii") as file:
                    file.writelines(lines)
                os.replace(whole, self._path)
            except BaseException:
                os.unlink(whole)
                raise
        except OSError as error:
            logger.warning("%s: hashes of weights are not remembered: %s", self._path, error)

    def _load(self) -> dict[str, tuple[Stamp, str]]:
        if self._path is None:
            return {}
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning("%s: remembered hashes cannot be read: %s", self._path, error)
            return {}
        entries: dict[str, tuple[Stamp, str]] = {}
        for line in content.splitlines():
            check, _, entry = line.partition(b" ")
            if check == xxhash.xxh3_64_hexdigest(entry).encode():
                path, *stamp, digest = json.loads(entry)
                entries[path] = (tuple(stamp), digest)
        return entries


def _line(entry: list[str | int]) -> str:
    text = json.dumps(entry)
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n"


def _hash_texts(*texts: str) -> str:
    return blake3(b"".join(map(length_prefixed, texts))).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON would give it back."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise UsageError(f"{where}: key {key!r} is neither a text nor a whole number")
            name = key if isinstance(key, str) else str(int(key))
            if name in plain:
                raise UsageError(f"{where}: the keys {name!r} and {int(name)} are one in JSON")
            plain[name] = _plain(item, f"{where}.{name}")
        return plain
    raise UsageError(f"{where}: a {type(value).__name__} has no JSON form; give it as a text")
