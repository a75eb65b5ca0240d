"""What every message between a node and its clients is made of."""

from __future__ import annotations

from typing import Annotated

import msgspec

# The node's loop must not be held by the decoding of one message; no list is this long.
Strings = Annotated[list[str], msgspec.Meta(max_length=4096)]
Numbers = Annotated[list[int], msgspec.Meta(max_length=4096)]


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A MessagePack array that begins with the message's tag."""
