"""How much of a prompt is held, and where."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, Hex32, Told
from kvstrata.control.prompts import Chunks, Prompt, chunks_of
from kvstrata.wire.client import NodeClient
from kvstrata.wire.protocol import ABSENT

router = APIRouter(responses=PROBLEMS, tags=["look"])
READS = ("/v1/lookup",)


class Run(Told):
    """Chunks that follow each other in one tier."""

    first: int = Field(description="Number of the first one, from 0.")
    count: int
    tier: str | None = Field(description="Where they are; null: nowhere.")


class Found(Told):
    """What is held of a prompt."""

    namespace: Hex32
    model: str
    tokens: int = Field(description="Of the prompt.")
    chunk_tokens: int = Field(description="Of a chunk; what fills none is never held.")
    chunks: int
    leading_tokens: int = Field(description="From the head on without a gap: what would hit.")
    leading_chunks: int
    tiers: dict[str, int] = Field(description="Chunks that would hit, by their fastest tier.")
    runs: list[Run] = Field(description="All chunks, those behind a gap too.")


@router.post("/v1/lookup", operation_id="lookup")
async def lookup(prompt: Prompt, here: Here) -> Found:
    """How many leading tokens of a prompt are held, and in which tiers. Changes nothing.

    Of a chunk that several tiers hold the fastest is told. Text and messages are made into tokens
    by the model's own files, which have to be on this machine. Shared tiers are asked as well
    where the engine told the node which byte orders it reads.
    """
    chunks = await chunks_of(here, prompt)
    tiers, names = await here.link.ask(lambda node: _found(node, chunks))
    leading = next((n for n, tier in enumerate(tiers) if tier == ABSENT), len(tiers))
    size = chunks.namespace.parts.chunk_tokens
    runs, first = [], 0
    for tier, group in groupby(tiers):
        count = len(list(group))
        runs.append(Run(first=first, count=count, tier=None if tier == ABSENT else names[tier]))
        first += count
    return Found(
        namespace=chunks.namespace.digest,
        model=chunks.namespace.model.get("name", ""),
        tokens=chunks.tokens,
        chunk_tokens=size,
        chunks=len(tiers),
        leading_tokens=leading * size,
        leading_chunks=leading,
        tiers=dict(Counter(names[tier] for tier in tiers[:leading])),
        runs=runs,
    )


def _found(node: NodeClient, chunks: Chunks) -> tuple[bytes, list[str]]:
    """The tier of each chunk by the secret under which most would hit, and the tiers' names."""
    namespace = chunks.namespace
    digest = bytes.fromhex(namespace.digest)
    answers = [
        node.lookup(keys, chunks.parts, namespace.orders, digest) if keys else b""
        for keys in chunks.keys
    ]
    best = max(answers, key=lambda tiers: (tiers + bytes([ABSENT])).index(ABSENT))
    return best, ["host", *node.hello.tiers]
