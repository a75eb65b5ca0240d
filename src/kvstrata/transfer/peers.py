"""What two nodes say to each other on TCP: ``docs/peers.md`` as code.

A connection begins with a proof from both ends that they know a secret of the deployment. Frames
are a little-endian 32-bit length and a MessagePack array; behind a `Data` come an object's bytes
and a `Sent`.
"""

from __future__ import annotations

import functools
import hmac
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from blake3 import blake3

import kvstrata
from kvstrata.errors import Incompatible, PeerRefused
from kvstrata.secret import MAX_SECRETS, Secrets

PEER_VERSION = 1
FRAME_BYTES = 4
"""Of a frame's length, before its body."""
MAX_FRAME_BYTES = 1 << 20
MAX_NAMES = 4096
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_METADATA_BYTES = 1 << 19
LINE_BYTES = 64
"""Of a cache line. The kernel packs what a connection sends into its own pages, begins one anew
where all before was taken in, and was seen to copy three times as fast where source and target lie
alike within a line. So what is sent beside an object's bytes takes whole lines."""
NIXL = "nixl"
LOAN_S = 10.0
"""How long an object is lent; who has it for longer has lost it."""

_T = TypeVar("_T")
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError)
_PROOF_CONTEXT = "KVStrata 1 peers"
_Bytes = Annotated[bytes, msgspec.Meta(max_length=256)]
_Names = Annotated[list[_Bytes], msgspec.Meta(max_length=MAX_NAMES)]
_Proofs = Annotated[list[_Bytes], msgspec.Meta(max_length=MAX_SECRETS)]
_Words = Annotated[list[Annotated[str, msgspec.Meta(max_length=32)]], msgspec.Meta(max_length=16)]

_Orders = Annotated[list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=16)]


class _Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    pass


class Hello(_Message, tag="hello", frozen=True):
    """The first word of both ends; ``proofs`` is empty in that of the end that connects.

    ``ways`` are those in which bytes can be had, beside the connection itself.
    """

    version: int
    release: str
    nonce: _Bytes
    now: float
    proofs: _Proofs
    ways: _Words


class Proof(_Message, tag="proof", frozen=True):
    proof: _Bytes


class Welcome(_Message, tag="welcome", frozen=True):
    pass


class Refused(_Message, tag="refused", frozen=True):
    why: str


class Ping(_Message, tag="ping", frozen=True):
    pass


class Stat(_Message, tag="stat", frozen=True):
    names: _Names


class Stats(_Message, tag="stats", frozen=True):
    """Sizes of whole objects; 0: it is not there."""

    sizes: Annotated[list[int], msgspec.Meta(max_length=MAX_NAMES)]


class Read(_Message, tag="read", frozen=True):
    """Ask for an object of ``most`` bytes at most."""

    name: _Bytes
    most: int


class Data(_Message, tag="data", frozen=True):
    """So many bytes follow; 0: it is not there; -1: it is larger. ``pad`` is for `aligned`."""

    nbytes: int
    pad: _Bytes = b""


class Sent(_Message, tag="sent", frozen=True):
    """Behind the bytes: whether the object ``stayed`` as it was until then. If not, it is gone."""

    stayed: bool
    pad: _Bytes = b""


class Fetch(_Message, tag="fetch", frozen=True):
    """Ask it to fetch chunks from the node at ``address``, which is the one that asks.

    ``parts`` make up a chunk, ``orders`` are those that they are in, ``lengths`` the bytes of each
    part's payload before any encoding, ``needs`` as of a match. Asked again while it is at it, it
    answers for the same job.
    """

    address: Annotated[str, msgspec.Meta(max_length=256)]
    namespace: _Bytes
    keys: _Names
    parts: Annotated[list[int], msgspec.Meta(max_length=MAX_NAMES)]
    orders: _Orders
    lengths: Annotated[list[int], msgspec.Meta(max_length=MAX_NAMES)]
    needs: Annotated[list[int], msgspec.Meta(max_length=MAX_NAMES)] = []


class Watch(_Message, tag="watch", frozen=True):
    """Ask how far a `Fetch` is."""

    job: int


class Fetching(_Message, tag="fetching", frozen=True):
    """How far it is: chunks and bytes; ``state`` as of a job, or ``refused``, with the reason."""

    job: int
    state: str
    done: int
    nbytes: int
    why: str


class Introduce(_Message, tag="introduce", frozen=True):
    """Ask for the other end's NIXL agent."""


class Agent(_Message, tag="agent", frozen=True):
    """What NIXL needs to know of an agent."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA_BYTES)]


class Borrow(_Message, tag="borrow", frozen=True):
    """Ask where an object of ``most`` bytes at most lies, and that it lies still.

    ``loan`` is a number that no other loan of this connection has.
    """

    loan: int
    name: _Bytes
    most: int


class Lent(_Message, tag="lent", frozen=True):
    """It lies there, and still, until `Return` or for `LOAN_S`; ``nbytes`` as of `Data`."""

    loan: int
    nbytes: int
    address: int


class Return(_Message, tag="return", frozen=True):
    """The object was read, before its loan could end."""

    loan: int


class Taken(_Message, tag="taken", frozen=True):
    """It is lent no more."""

    loan: int


Request = Hello | Proof | Ping | Stat | Read | Fetch | Watch | Introduce | Borrow | Return
Reply = Hello | Welcome | Refused | Stats | Data | Sent | Fetching | Agent | Lent | Taken

encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


@functools.lru_cache(maxsize=64)
def aligned(message: Data | Sent) -> bytes:
    """The body of a frame that takes whole lines, `FRAME_BYTES` and all.

    Args:
        message: without a pad.
    """
    lacks = -(FRAME_BYTES + len(encode(message))) % LINE_BYTES
    return encode(msgspec.structs.replace(message, pad=bytes(lacks)))


def decode_request(body: bytes) -> Request:
    """Raises `Incompatible` for anything that is no request of this version, nor a `Hello`."""
    return _decoded(_requests, body)


def decode_reply(body: bytes) -> Reply:
    """Raises `Incompatible` for anything that is no reply of this version, nor a `Hello`."""
    return _decoded(_replies, body)


def _decoded(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T | Hello:
    try:
        return decoder.decode(body)
    except _UNDECODABLE as error:
        if (hello := _hello_of_another(body)) is not None:
            return hello
        raise Incompatible(f"not what a node of protocol {PEER_VERSION} says: {error}") from error


def _hello_of_another(body: bytes) -> Hello | None:
    """The first word of a node of another version, as far as every version has it."""
    try:
        words = msgspec.msgpack.decode(body, type=list)
    except _UNDECODABLE:
        return None
    match words:
        case ["hello", int(version), str(release), *_] if version != PEER_VERSION:
            return Hello(version, release, b"", 0.0, [], [])
    return None


class Handshake:
    """One end's part in the proof that both know a secret; one that both know will do.

    The end that was connected to proves each that it knows, since it cannot tell which of them the
    other one knows. To whoever knows none of them, proofs look like any random bytes.

    Args:
        known: the deployment's secrets, 32 bytes each.
        ways: as of `Hello`.
    """

    def __init__(self, known: Secrets, ways: Sequence[str] = ()) -> None:
        self._ways = list(ways)
        self._keys = [blake3(one, derive_key_context=_PROOF_CONTEXT).digest() for one in known]
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self, proofs: Sequence[bytes] = ()) -> Hello:
        """This end's first word."""
        return Hello(
            PEER_VERSION, kvstrata.__version__, self.nonce, time.time(), list(proofs), self._ways
        )

    def answer(self, hello: Hello) -> Hello:
        """The first word of the end that was connected to."""
        check_version(hello)
        proofs = [_proof(key, b"server", hello.nonce, self.nonce) for key in self._keys]
        # How many are known is nobody's affair who knows none.
        unknown = MAX_SECRETS - len(proofs)
        return self.hello([*proofs, *(secrets.token_bytes(PROOF_BYTES) for _ in range(unknown))])

    def check_server(self, hello: Hello, where: str) -> Proof:
        """The proof of the end that connects, once the other one has proved itself.

        Raises:
            Incompatible: another version.
            PeerRefused: it knows no secret that is known here.
        """
        check_version(hello)
        for key in self._keys:
            if _is_among(hello.proofs, _proof(key, b"server", self.nonce, hello.nonce)):
                return Proof(_proof(key, b"client", self.nonce, hello.nonce))
        raise PeerRefused(f"{where} has another secret; copy the deployment's secret_file there")

    def check_client(self, hello: Hello, proof: Proof) -> bool:
        """Whether the end that connected knows a secret that is known here."""
        proofs = [_proof(key, b"client", hello.nonce, self.nonce) for key in self._keys]
        return _is_among(proofs, proof.proof)


def _proof(key: bytes, who: bytes, client: bytes, server: bytes) -> bytes:
    return blake3(who + client + server, key=key).digest()


def _is_among(proofs: Sequence[bytes], wanted: bytes) -> bool:
    """Whether one of them is the one, in a time that does not tell how much of it is."""
    return any([hmac.compare_digest(one, wanted) for one in proofs])


def check_version(hello: Hello) -> None:
    """Raises `Incompatible` for an end of another protocol, or one whose nonce is no nonce."""
    if hello.version != PEER_VERSION or len(hello.nonce) != NONCE_BYTES:
        raise Incompatible(
            f"the other node (KVStrata {hello.release[:32]!r}) speaks peer protocol "
            f"{hello.version}, this one (KVStrata {kvstrata.__version__}) {PEER_VERSION}; install "
            "one release on both sides"
        )
