"""Kept tokens in a node: looked for by the deepest key that is there, brought, and stored."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import cached_property

from msgspec.structs import replace

from kvstrata.connectors.transformers.kinds import Kind
from kvstrata.connectors.transformers.loads import Load
from kvstrata.errors import CorruptObject, DeadlineExceeded, KVStrataError, UsageError
from kvstrata.header import ObjectHeader
from kvstrata.keys import owner_digest
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.pagekeys import chain_of
from kvstrata.parts import KEPT
from kvstrata.selection import kept as k
from kvstrata.selection.kept import Kept
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.namespaces import Described

PART = 0
ENOUGH = 0.5
"""Of the whole chunks before a question: what is kept of fewer is not taken for their context."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the objects of one selection belong.

    Args:
        described: the namespace, with its selection.
        kind: the layers of the model: full attention, of one shape.
        keep: the fraction that is kept.
    """

    described: Described
    kind: Kind
    keep: float

    @classmethod
    def of(cls, exact: Described, kind: Kind, selection: str, keep: float) -> Place:
        """That of a selection from what an exact namespace has."""
        parts = dataclasses.replace(exact.parts, selection=selection)
        told = replace(exact, parts=parts, orders=[KEPT], objects=[PART], needs=[1], lengths=[])
        return cls(told, kind, keep)

    @cached_property
    def digest(self) -> bytes:
        """The namespace's."""
        return self.described.parts.digest()

    def keys(self, secret: bytes, tokens: Sequence[int], chunks: int) -> list[bytes]:
        """Of the first chunks of a prompt."""
        size = self.kind.chunk_tokens
        chain = chain_of(secret, self.digest, size, pages=self.described.parts.pages)
        return chain.keys(tokens[: chunks * size])

    def shape(self, chunks: int) -> tuple[int, int, int, int, int]:
        """Of the object that stands for so many chunks, (L, S, H, R, D)."""
        group = self.kind.group
        heads = group.num_layers * group.num_kv_heads
        rows = k.budget_rows(heads, chunks * self.kind.chunk_tokens, self.keep)
        return group.num_layers, k.STATES, group.num_kv_heads, rows, group.head_dim

    def nbytes(self, chunks: int) -> int:
        """Of its payload."""
        return k.payload_bytes(self.shape(chunks), self.kind.group.dtype)

    def check(self, kept: Kept, chunks: int) -> None:
        """Whether what a method gave goes into the object that stands for so many chunks.

        Raises:
            UsageError: it is of another model or context, or more than its budget.
        """
        shape, tokens = self.shape(chunks), chunks * self.kind.chunk_tokens
        found = kept.shape(shape[3]), kept.dtype, kept.prompt_tokens
        if found != (shape, self.kind.group.dtype, tokens):
            raise UsageError(
                f"kept: {kept.shape()} of {kept.dtype} from {kept.prompt_tokens} tokens does not "
                f"go into {shape} of {self.kind.group.dtype} from {tokens}"
            )


def find(
    client: NodeClient, place: Place, keys: Sequence[bytes], at_least: int, patience_s: float
) -> int:
    """Chunks before the deepest boundary at which something is kept; 0: nowhere deep enough.

    Args:
        keys: of the chunks before the question.
        at_least: chunks that it has to stand for.
    Raises:
        KVStrataError: the node did not answer.
    """
    tiers = client.lookup(keys, [PART], [KEPT], place.digest, timeout_s=patience_s)
    deepest = max((i for i, tier in enumerate(tiers, 1) if tier != p.ABSENT), default=0)
    return deepest if deepest >= at_least else 0


def load(
    client: NodeClient,
    place: Place,
    keys: Sequence[bytes],
    chunks: int,
    tenant: str,
    answer_s: float,
    load_s: float,
) -> tuple[Kept | None, Load]:
    """Bring what is kept of the first chunks.

    Args:
        keys: of all whole chunks of the prompt.
        chunks: that it has to stand for.
    Returns:
        What came, in memory of its own, and what to tell the operator of it.
    """
    begun = time.monotonic()
    came, told = None, Load(keys)
    lease = 0
    try:
        answer: p.Matched = client.match(
            [keys[chunks - 1]],
            [PART],
            [KEPT],
            [place.nbytes(chunks)],
            owner_digest(client.hello.secret, tenant, ""),
            place.digest,
        ).wait(answer_s)
        lease = answer.lease
        told.why = answer.why
        if answer.tiers:
            told.found, told.tiers = chunks, answer.tiers * chunks
            (offset,) = offsets_of(answer.offsets)
            if offset == p.ARRIVING:
                left = load_s - (time.monotonic() - begun)
                arrived: p.Arrived = client.await_arrival(lease, 0).wait(max(0.0, left))
                (offset,) = offsets_of(arrived.offsets) or (p.ARRIVING,)
            if offset == p.ARRIVING:
                told.failed = "it did not come"
            else:
                came = _copied(client, place, keys[:chunks], offset)
                told.loaded = chunks
    except KVStrataError as error:
        told.failed = f"{type(error).__name__}: {error}"
        told.too_late = isinstance(error, DeadlineExceeded)
    finally:
        client.release(lease)
    told.seconds = time.monotonic() - begun
    return came, told


def _copied(client: NodeClient, place: Place, keys: Sequence[bytes], offset: int) -> Kept:
    """What a slot holds.

    Raises:
        CorruptObject: it is not what was leased.
    """
    header = decode(client.pool.view(offset, HEADER_BYTES))
    if header.key != keys[-1] or header.group << 16 | header.rank != PART:
        raise CorruptObject("a slot holds another object than the one that was leased")
    _check(header, place, len(keys))
    payload = client.pool.array(offset + HEADER_BYTES, header.raw_length).copy()
    if k.positions_digest(payload, header.shape) != header.positions:
        raise CorruptObject("positions of kept tokens are not those that the header names")
    return k.decode(payload, header.shape, header.dtype, header.boundary)


def _check(header: ObjectHeader, place: Place, chunks: int) -> None:
    group = place.kind.group
    expected = (KEPT, "raw", group.dtype, place.shape(chunks), chunks * place.kind.chunk_tokens)
    found = (header.kind, header.codec, header.dtype, header.shape, header.boundary)
    if found != expected:
        raise CorruptObject(f"a payload of {found}; not {expected}")


def store(
    client: NodeClient,
    place: Place,
    keys: Sequence[bytes],
    kept: Kept,
    tenant: str,
    weights: str,
    patience_s: float,
) -> bool:
    """Store what is kept of the chunks that these keys are of; whether it was written.

    Raises:
        KVStrataError: the node has gone, or does not answer.
        UsageError: more is kept than the budget has room for.
    """
    chunks, shape = len(keys), place.shape(len(keys))
    place.check(kept, chunks)
    group, nbytes = place.kind.group, place.nbytes(chunks)
    template = p.Template(
        kind=KEPT,
        order="",
        dtype=group.dtype,
        shape=list(shape),
        num_tokens=place.kind.chunk_tokens,
        raw_length=nbytes,
        chunk_tokens=place.kind.chunk_tokens,
        group=PART >> 16,
        group_kind="recurrent",
        producer="transformers",
        positions=k.positions_digest(k.table(kept, shape[3]), shape),
    )
    reserved: p.Reserved = client.reserve(
        place.digest, keys, chunks - 1, PART, template, 0.0, weights,
        owner_digest(client.hello.secret, tenant, ""),
    ).wait(patience_s)  # fmt: skip
    (offset,) = offsets_of(reserved.offsets)
    if offset < 0:
        return offset == p.PRESENT
    written = bytes(16)
    try:
        payload = client.pool.array(offset + HEADER_BYTES, nbytes)
        k.encode(kept, payload, shape[3])
        written = checksum(payload.data)
    finally:
        client.commit(reserved.reservation, [written]).wait(patience_s)
    return True
