"""Why tokens of a request, or of a prompt, are not loaded: as fields and as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter
from pydantic import Field, JsonValue

from kvstrata.control.base import PROBLEMS, Here, MayWrite, State, Text, Told
from kvstrata.control.link import ANSWER_S
from kvstrata.control.problems import Forbidden, Invalid, NoSuch
from kvstrata.control.prompts import Chunks, Prompt, chunks_of
from kvstrata.errors import UsageError
from kvstrata.heads import heads
from kvstrata.observe.reasons import Unloaded
from kvstrata.observe.sentences import sentence
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient
from kvstrata.wire.explaining import explain_request, unloaded

router = APIRouter(responses=PROBLEMS, tags=["look"])
READS = ("/v1/explain",)


class Explain(Prompt):
    """A request that has ended, or a prompt as things stand."""

    request: Text | None = Field(
        None, description="Id of a request, or a part of it, instead of a prompt.", min_length=1
    )
    across_tenants: bool = Field(
        False,
        description="Say, too, whether another tenant or salt has the same tokens; where there are "
        "tokens, it takes one for writing.",
    )


class Cause(Told):
    """Why some tokens that follow each other are not loaded."""

    why: str = Field(description="The cause in a word or two; `docs/reasons.md` has them all.")
    tokens: int = Field(description="How many.")
    tier: str = Field(description="Which one it is about; empty: none.")
    detail: str = Field(description="What else is known of it.")
    ago_s: float = Field(description="Seconds since it happened; 0: it is not known when.")
    text: str = Field(description="The same as a sentence.")
    advice: str = Field(description="What to do about it.")


class Explained(Told):
    """What became of it, or would."""

    request: str = Field(description="Its id; empty: it is a prompt.")
    tokens: int = Field(description="Of the prompt.")
    tiers: dict[str, int] = Field(
        description="Of a prompt: tokens that would hit now, by their fastest tier."
    )
    reasons: list[Cause] = Field(description="Of what was not loaded, in the prompt's order.")
    elsewhere: str = Field(
        description="Of a request, with `across_tenants`: in what the namespace differs where "
        "somebody else has the same beginning now; empty: nobody has, or it was not asked."
    )
    record: dict[str, JsonValue] | None = Field(
        description="Of a request: all that its engine told of it."
    )


@router.post("/v1/explain", operation_id="explain")
async def explain(asked: Explain, here: Here, may_write: MayWrite) -> Explained:
    """Say why a request computed what it computed, or what a prompt would find now.

    Loads and counts nothing. A node remembers its last 1,024 requests.
    """
    if asked.across_tenants and not may_write:
        raise Forbidden("this token may not learn what other tenants have")
    if asked.request is None:
        return await _prompt(here, asked)
    names = ("tokens", "text", "messages", "keys", "model", "namespace", "salt")
    if given := [name for name in names if getattr(asked, name)]:
        raise Invalid(given[0], "a request has its own; expected either request or a prompt")
    return await _request(here, asked.request, across=asked.across_tenants)


async def _request(here: State, request: str, *, across: bool) -> Explained:
    def work(node: NodeClient) -> p.Explained:
        try:
            return explain_request(node, request, ANSWER_S, across=across)
        except UsageError as error:
            raise NoSuch(str(error)) from error

    told = await here.link.ask(work)
    record = told.record
    tokens = record.get("prompt_tokens")
    return Explained(
        request=str(record.get("request", "")),
        tokens=tokens if isinstance(tokens, int) else 0,
        tiers={},
        reasons=_causes(msgspec.convert(record.get("reasons", []), list[Unloaded])),
        elsewhere=", ".join(one.detail for one in told.reasons),
        record=record,
    )


async def _prompt(here: State, asked: Explain) -> Explained:
    chunks = await chunks_of(here, asked)
    size = chunks.namespace.parts.chunk_tokens

    def work(node: NodeClient) -> tuple[p.Explained, list[str]]:
        return _asked(node, chunks, across=asked.across_tenants), ["host", *node.hello.tiers]

    told, names = await here.link.ask(work)
    found = Counter(names[tier] for tier in told.tiers)
    return Explained(
        request="",
        tokens=chunks.tokens,
        tiers={name: count * size for name, count in found.items()},
        reasons=_causes(unloaded(told, chunks.tokens, chunks.namespace)),
        elsewhere="",
        record=None,
    )


def _asked(node: NodeClient, chunks: Chunks, *, across: bool) -> p.Explained:
    """What the node says of the prompt under the secret by which most of it is there."""
    begin = heads(node.hello.secret, chunks.ids, chunks.namespace.parts.chunk_tokens)
    answers = [
        node.begin(
            p.Explain, p.Explained, "", b"".join(keys), chunks.digest, chunks.owner, begin, across
        ).wait(ANSWER_S)
        for keys in chunks.keys
        if keys
    ]
    nothing = p.Explained(0, {}, b"", [])
    return max(answers, key=lambda told: len(told.tiers), default=nothing)


def _causes(reasons: Sequence[Unloaded]) -> list[Cause]:
    return [_cause(reason) for reason in reasons]


def _cause(reason: Unloaded) -> Cause:
    text, advice = sentence(reason)
    return Cause(
        why=reason.why.value,
        tokens=reason.tokens,
        tier=reason.tier,
        detail=reason.detail,
        ago_s=reason.ago_s,
        text=text,
        advice=advice,
    )
