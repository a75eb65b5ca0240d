"""What a node says of itself in the registry, and how it is kept there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from kvstrata.errors import Incompatible

MAX_TIERS = 64
MAX_NAMESPACES = 16
LASTS_S = 5.0
"""For how long a registration lasts that is not renewed."""
JOINING, MEMBER, DRAINING = "joining", "member", "draining"
_BOOT_DIGITS = 16

MAX_PARTS = 4096

_Text = Annotated[str, msgspec.Meta(max_length=512)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Holding(msgspec.Struct, frozen=True):
    """What one tier of a node holds; of a shared one only its name is the node's own."""

    tier: _Text
    shared: bool = False
    capacity_bytes: int = 0
    used_bytes: int = 0
    num_chunks: int = 0


class Model(msgspec.Struct, frozen=True):
    """A namespace that engines of a node use.

    Args:
        namespace: its digest, in hex.
        model: the model's name, where they told it.
        chunk_tokens: of a chunk.
        parts: how many objects make up a chunk.
        objects: which these are; none: the first so many, as older nodes say.
        needs: of each of them, how many of the last chunks a boundary needs; 0, or none: every one.
        pages: whether its keys are those of pages, as ``Namespace.pages`` says.
    """

    namespace: _Digest
    model: _Text = ""
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1)] = 128
    parts: Annotated[int, msgspec.Meta(ge=1, le=MAX_PARTS)] = 1
    objects: Annotated[list[_Number], msgspec.Meta(max_length=MAX_PARTS)] = []
    needs: Annotated[list[_Number], msgspec.Meta(max_length=MAX_PARTS)] = []
    pages: bool = False

    def __post_init__(self) -> None:
        if self.needs and len(self.needs) != len(self.objects):
            raise ValueError("as many needs as objects")

    @property
    def of_chunk(self) -> Sequence[int]:
        """The parts that make up a chunk."""
        return self.objects or range(self.parts)


class Member(msgspec.Struct, frozen=True):
    """A node of the fleet.

    Args:
        name: in the fleet.
        boot: another one for each process of that name, and larger each time.
        release, protocol: KVStrata's, and of the node's socket.
        pid: of the process, on its own machine.
        socket: path of the node's socket, on its own machine.
        peers: where other nodes find it; empty: nowhere.
        api: where its HTTP API is; empty: nowhere.
        state: `JOINING` until it has caught up with the fleet's commands.
        seen: number of the last command that it has carried out.
        clock_offset_s: by how much its clock is ahead of the registry's, in seconds.
        tiers: what it holds.
        models: the namespaces in use.
    """

    name: _Text
    boot: int
    release: _Text
    protocol: int
    pid: int
    socket: _Text = ""
    peers: _Text = ""
    api: _Text = ""
    state: _Text = JOINING
    seen: int = 0
    clock_offset_s: float = 0.0
    tiers: Annotated[list[Holding], msgspec.Meta(max_length=MAX_TIERS)] = []
    models: Annotated[list[Model], msgspec.Meta(max_length=MAX_NAMESPACES)] = []


_decoder = msgspec.json.Decoder(Member)


def encode_member(member: Member) -> bytes:
    """The value in the registry: the boot in 16 digits, then JSON."""
    return b"%016d" % member.boot + msgspec.json.encode(member)


def decode_member(value: bytes) -> Member:
    """The inverse.

    Raises:
        Incompatible: it is none.
    """
    try:
        return _decoder.decode(value[_BOOT_DIGITS:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Incompatible(f"the registry has no member there: {error}") from error
