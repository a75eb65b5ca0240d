"""The deployment's secret in its file: made at first start, exchanged without a moment between.

The file holds one secret, or two while one takes the other's place. ``docs/keys.md`` says what is
derived from them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3

from kvstrata.errors import ConfigError

SECRET_BYTES = 32
MAX_SECRETS = 2

Secrets: TypeAlias = tuple[bytes, ...]
"""All that are known, 32 bytes each: first the one that stores use."""

_CHECK_CONTEXT = "KVStrata 1 secret check"


def load_secrets(path: str | os.PathLike[str]) -> Secrets:
    """The secrets of a deployment; one is made at the first call, with mode 0600.

    Processes that call this at once, on one machine or on a shared file system, get the same
    secret: the file is complete before it has its name, and the first to name it wins.

    Raises:
        ConfigError: the file cannot be read or made, others can read it, or it holds something
            else; the message names the path and what to do.
    """
    path = Path(path)
    try:
        if not path.exists():
            with _complete(path, new_secret()) as whole, contextlib.suppress(FileExistsError):
                # If another process was first, its secret is the deployment's.
                os.link(whole, path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            held = file.read(MAX_SECRETS * SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), f"cannot read or make the secret: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(
            str(path), f"others may use the secret (mode {mode:04o}); run: chmod 600 '{path}'"
        )
    if len(held) not in (SECRET_BYTES, MAX_SECRETS * SECRET_BYTES):
        raise ConfigError(
            str(path),
            f"holds {status.st_size} bytes, expected {SECRET_BYTES}, or twice as many for two "
            "secrets; copy the deployment's secret here, or remove the file to have a new one made "
            "(what is stored is then lost)",
        )
    known = tuple(held[at : at + SECRET_BYTES] for at in range(0, len(held), SECRET_BYTES))
    if len(set(known)) != len(known):
        raise ConfigError(
            str(path), f"holds one secret twice; run: truncate --size={SECRET_BYTES} '{path}'"
        )
    return known


def save_secrets(path: str | os.PathLike[str], known: Secrets) -> None:
    """Put other secrets in a file's place, whole and at once; its owner and mode 0600 stay.

    Raises:
        ConfigError: the folder cannot be written; the file is as it was.
    """
    path = Path(path)
    try:
        path = path.resolve()
        status = path.stat()
        with _complete(path, b"".join(known)) as whole:
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(whole, status.st_uid, status.st_gid)
            os.replace(whole, path)
    except OSError as error:
        raise ConfigError(str(path), f"cannot change the secret: {error.strerror}") from error


def new_secret() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(SECRET_BYTES)


def secret_check(secret: bytes) -> str:
    """16 hex digits that tell whether two secrets are one, and nothing else of them."""
    return blake3(secret, derive_key_context=_CHECK_CONTEXT).hexdigest()[:16]


@contextlib.contextmanager
def _complete(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside ``path`` that is on the disk, whole; gone at the end unless it was renamed."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield whole
    finally:
        with contextlib.suppress(FileNotFoundError):
            whole.unlink()
