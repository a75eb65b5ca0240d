"""From a node's slots into a model's cache: one match, what arrives of it, and a lease as long."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstrata.connectors.transformers.contents import Filling
from kvstrata.connectors.transformers.kinds import Kind, Kinds
from kvstrata.errors import CorruptObject, DeadlineExceeded, KVStrataError
from kvstrata.header import ObjectHeader
from kvstrata.heads import heads
from kvstrata.keys import owner_digest
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.observe.reasons import Reason
from kvstrata.pagekeys import chain_of
from kvstrata.producers import origin
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.namespaces import Described


@dataclass
class Load:
    """What came of asking for a prompt.

    Args:
        keys: of its chunks that were asked for.
    """

    keys: Sequence[bytes]
    found: int = 0
    """Leading chunks that the node had."""
    loaded: int = 0
    """Those of them that are in the cache now."""
    tiers: bytes = b""
    """Of each that was found where it was."""
    why: Sequence[Reason] = ()
    """Of those that were not found."""
    failed: str = ""
    """Why what was found was not loaded, or nothing was found out."""
    too_late: bool = False
    """Whether that is because the node did not answer in time."""
    seconds: float = 0.0
    shared: bool = False
    """Whether other engines may have computed them."""
    origins: Counter[str] = field(default_factory=Counter)
    """Tokens that were loaded, by the engine that computed them."""


class Loads:
    """Loads prompts; from whichever thread.

    Args:
        tenant: as configured.
        answer_s: how long the node may take to answer.
        load_s: how long a whole load may take.
    """

    def __init__(self, tenant: str, answer_s: float, load_s: float) -> None:
        self._tenant = tenant
        self._answer_s = answer_s
        self._load_s = load_s

    def load(
        self,
        client: NodeClient,
        kinds: Kinds,
        described: Described,
        tokens: Sequence[int],
        cache: Any,
    ) -> Load:
        """Fill an empty cache with what the node has of a prompt; its last token is computed.

        Args:
            kinds: of the cache's layers.
            described: the model's namespace.
            tokens: of the prompt.
        Returns:
            What came of it. Errors are in it, and then the cache is as empty as it was.
        """
        begun = time.monotonic()
        secret = client.hello.secret
        whole = (len(tokens) - 1) // kinds.chunk_tokens
        digest, pages = described.parts.digest(), described.parts.pages
        chain = chain_of(secret, digest, kinds.chunk_tokens, pages=pages)
        load = Load(chain.keys(tokens[: whole * kinds.chunk_tokens]) if whole else [], shared=pages)
        if not load.keys:
            return load
        lease = 0
        try:
            answer: p.Matched = client.match(
                load.keys,
                [kind.part for kind in kinds.each],
                described.orders,
                [kind.nbytes for kind in kinds.each],
                owner_digest(secret, self._tenant, ""),
                digest,
                heads=heads(secret, tokens, kinds.chunk_tokens),
                needs=kinds.needs,
            ).wait(self._answer_s)
            lease = answer.lease
            load.found, load.tiers, load.why = len(answer.tiers), answer.tiers, answer.why
            if load.found:
                filling = Filling(kinds, load.found)
                deadline = begun + self._load_s
                offsets = offsets_of(answer.offsets).tolist()
                came = self._gather(client, lease, kinds, load, offsets, filling, deadline)
                if came:
                    filling.pour(cache, came)
                load.loaded = came
        except KVStrataError as error:
            load.failed = f"{type(error).__name__}: {error}"
            load.too_late = isinstance(error, DeadlineExceeded)
        finally:
            client.release(lease)
        load.seconds = time.monotonic() - begun
        return load

    def _gather(
        self,
        client: NodeClient,
        lease: int,
        kinds: Kinds,
        load: Load,
        offsets: list[int],
        filling: Filling,
        deadline: float,
    ) -> int:
        """Copy chunks as they arrive; how many leading ones there are in the end."""
        width, done = len(kinds.each), 0
        while done < load.found:
            row = offsets[done * width : (done + 1) * width]
            if p.ARRIVING not in row:
                for kind, offset in zip(kinds.each, row, strict=True):
                    if offset >= 0:
                        header = _copy(client, kind, load.keys[done], done, offset, filling)
                        if kind is kinds.each[0]:
                            load.origins[origin(header)] += header.num_tokens
                done += 1
                continue
            left = deadline - time.monotonic()
            arrived: p.Arrived = client.await_arrival(lease, done).wait(max(0.0, left))
            came = offsets_of(arrived.offsets).tolist()
            if not came:
                load.failed = f"chunk {done} did not come"
                # Where a kind has a window, fewer chunks are another boundary, which needs others.
                return 0 if kinds.needs else done
            offsets[done * width : done * width + len(came)] = came
        return done


def _copy(
    client: NodeClient, kind: Kind, key: bytes, number: int, offset: int, filling: Filling
) -> ObjectHeader:
    """One object out of its slot; what its header says.

    Raises:
        CorruptObject: the slot holds something else than what was leased.
    """
    header = decode(client.pool.view(offset, HEADER_BYTES))
    if header.key != key or header.group << 16 | header.rank != kind.part:
        raise CorruptObject("a slot holds another object than the one that was leased")
    if not kind.fits(header):
        raise CorruptObject(
            f"a payload of {header.dtype} {header.shape}, order {header.order!r}, codec "
            f"{header.codec!r}; not {kind.group.dtype} {kind.shape}"
        )
    payload = client.pool.array(offset + HEADER_BYTES, header.raw_length)
    filling.put(kind, number, payload, header.order)
    return header
