"""The objects that make up a chunk: a part is ``level << 28 | group << 16 | rank``.

Group and rank say which of a chunk's KV it is, the level which copy of that: 0 the object itself,
above it coarser ones that a slower tier may keep besides.
"""

from __future__ import annotations

from kvstrata.header import GROUP_BITS, object_id, split_object_id


def identity(key: bytes, part: int) -> bytes:
    """The object id of one part of a chunk."""
    return object_id(key, part >> 16, part & 0xFFFF)


def named(object_id: bytes) -> tuple[bytes, int]:
    """Key and part of an object: the inverse of `identity`."""
    key, group, rank = split_object_id(object_id)
    return key, group << 16 | rank


MAX_PART: int = (1 << 16 + GROUP_BITS) - 1


def at_level(part: int, level: int) -> int:
    """The part of a coarser copy, which a slower tier may keep beside the object itself."""
    return part | level << 16 + GROUP_BITS


PORTABLE = "portable"
"""The name of the one order that every engine reads."""
KEPT = "kept"
"""The name of the one order of selected tokens."""
PERHAPS_LOSSY = (PORTABLE, KEPT)
"""What may have been through a lossy codec: nothing else tells, and none may have it again."""


def order_name(kind: str, order: str) -> str:
    """The one name under which readers ask for an object's byte order."""
    return order if kind == "native" else kind
