"""Where the keys of a tier's encryption come from: a file, the environment, or a command.

A source yields one key a line, 64 hex digits each. What it yields is never logged, nor part of an
error.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import stat
import subprocess
from pathlib import Path

from kvstrata.errors import ConfigError

logger = logging.getLogger(__name__)

COMMAND_S = 10.0
"""How long a command may take."""
MAX_BYTES = 1 << 16
"""Of what a source yields: a thousand keys are not meant."""

_KEY = re.compile(r"[0-9a-fA-F]{64}")
_LIKE_A_KEY = re.compile(r"[0-9a-fA-F]{32,}")
_HOW = "make one with: openssl rand -hex 32"


def read_keys(source: str, option: str) -> list[bytes]:
    """The keys of a source, 32 bytes each, the one that encrypts first.

    Blocks: a command has 10 s.

    Args:
        source: ``file:``, ``env:`` or ``command:`` and what belongs to it.
        option: its path in the configuration, for errors.
    Raises:
        ConfigError: there is no key to be had, what is there is no key, or others can read it.
    """
    kind, _, where = source.partition(":")
    text = {"file": _from_file, "env": _from_environment, "command": _from_command}[kind](
        where, option
    )
    keys = text.split()
    if not keys:
        raise ConfigError(option, f"{source} yields no key; {_HOW}")
    for number, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            raise ConfigError(
                option, f"{source}: line {number} is no key, which is 64 hex digits; {_HOW}"
            )
    return [bytes.fromhex(key) for key in keys]


def _from_file(where: str, option: str) -> str:
    try:
        with Path(where).open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise ConfigError(option, f"{where} cannot be read: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(
            option,
            f"others may use the keys in {where} (mode {mode:04o}); run: chmod 600 '{where}'",
        )
    return _decoded(content)


def _from_environment(where: str, option: str) -> str:
    if where not in os.environ:
        raise ConfigError(option, f"the node's environment has no variable {where}")
    return os.environ[where]


def _from_command(where: str, option: str) -> str:
    words = shlex.split(where)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(option, f"{words[0]} cannot be run: {error.strerror}") from error
    with process:
        try:
            output, errors = process.communicate(timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever holds its pipes
            raise ConfigError(option, f"{words[0]} did not end within {COMMAND_S:g} s") from None
    for line in _decoded(errors[:MAX_BYTES]).splitlines():
        logger.warning("%s: %s", words[0], _LIKE_A_KEY.sub("[hidden]", line))
    if process.returncode:
        raise ConfigError(
            option,
            f"{words[0]} ended with status {process.returncode}; what it said is in the node's log",
        )
    return _decoded(output[:MAX_BYTES])


def _decoded(content: bytes) -> str:
    return content.decode(errors="replace")
