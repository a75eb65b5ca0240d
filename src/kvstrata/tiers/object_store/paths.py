"""Where things lie in an object store; the page on the object store tier has it."""

from __future__ import annotations

import re

EPOCH = "epoch"
LEASE = "sweeper"
USES = "uses"

_OBJECT = re.compile(r"([0-9a-f]{16}/[0-9a-f]{16})/((?:[0-9a-f]{2}){1,48})")


def path_of(name: bytes) -> str:
    """Of an object: its epoch, its namespace's tag, and the rest of its name, in hex."""
    text = name.hex()
    return f"{text[:16]}/{text[16:32]}/{text[32:]}"


def name_of(path: str) -> bytes | None:
    """The inverse; None where this is no object of ours."""
    found = _OBJECT.fullmatch(path)
    return bytes.fromhex(found[1].replace("/", "") + found[2]) if found else None


def folder_of(epoch: int) -> str:
    """Under which an epoch's objects lie."""
    return f"{epoch:016x}"
