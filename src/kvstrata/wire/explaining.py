"""Asking a node why: of a request that has ended, or of a prompt as things stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvstrata.header import NOBODY
from kvstrata.heads import heads
from kvstrata.keys import Tokens, owner_digest
from kvstrata.observe.reasons import Reason, Unloaded, Why
from kvstrata.pagekeys import chain_of
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient
from kvstrata.wire.namespaces import Described


def explain_request(
    client: NodeClient, request: str, timeout_s: float, *, across: bool = False
) -> p.Explained:
    """What became of a request.

    Args:
        client: of the node that has its record.
        request: its id, or a part of it.
        timeout_s: how long to wait for the answer.
        across: whether to be told that another tenant or salt has the same tokens.

    Raises:
        UsageError: there is no such record.
        NodeUnavailable, DeadlineExceeded: the node does not answer.
    """
    call = client.begin(p.Explain, p.Explained, request, b"", b"", NOBODY, b"", across)
    explained: p.Explained = call.wait(timeout_s)
    return explained


def explain_prompt(
    client: NodeClient,
    namespace: Described,
    tokens: Tokens,
    timeout_s: float,
    *,
    salt: str = "",
    across: bool = False,
) -> p.Explained:
    """What would become of a prompt now; at most as many chunks of it as a match may name.

    Args:
        client: of the node.
        namespace: under which it would be asked for.
        tokens: its ids.
        timeout_s: how long to wait for the answer.
        salt: the request's, empty if it has none.
        across: as of `explain_request`.

    Raises:
        UsageError: no token ids, or fewer than a chunk's.
        NodeUnavailable, DeadlineExceeded: the node does not answer.
    """
    secret, parts = client.hello.secret, namespace.parts
    digest, size = parts.digest(), parts.chunk_tokens
    chain = chain_of(secret, digest, size, salt, pages=parts.pages)
    keys = chain.keys(tokens)[: p.MAX_KEYS]
    owner = owner_digest(secret, parts.tenant, salt)
    begin = heads(secret, tokens, size)
    call = client.begin(p.Explain, p.Explained, "", b"".join(keys), digest, owner, begin, across)
    explained: p.Explained = call.wait(timeout_s)
    return explained


def unloaded(explained: p.Explained, num_tokens: int, namespace: Described) -> list[Unloaded]:
    """The reasons of a prompt by tokens, its end included."""
    size = namespace.parts.chunk_tokens
    reasons = [_by_tokens(reason, size) for reason in explained.reasons]
    if rest := num_tokens % size:
        reasons.append(Unloaded(Why.PARTIAL, rest))
    return reasons


def _by_tokens(reason: Reason, chunk_tokens: int) -> Unloaded:
    tokens = reason.chunks * chunk_tokens
    return Unloaded(reason.why, tokens, reason.tier, reason.detail, reason.ago_s)


def new_records(
    client: NodeClient, after: int, timeout_s: float
) -> tuple[list[dict[str, Any]], int]:
    """The records of requests behind the one with a number, oldest first, and how many are lost.

    Args:
        client: of the node that keeps them; it keeps the last 1,024.
        after: the last one that is known; 0: none is.
        timeout_s: how long to wait for each page.

    Raises:
        NodeUnavailable, DeadlineExceeded: the node does not answer.
    """
    found: list[dict[str, Any]] = []
    for record in _latest_first(client, timeout_s):
        if record["number"] <= after:
            return found[::-1], 0
        found.append(record)
    oldest = found[-1]["number"] if found else after + 1
    return found[::-1], oldest - after - 1


def _latest_first(client: NodeClient, timeout_s: float) -> Iterator[dict[str, Any]]:
    before = 0
    while True:
        page: p.RecordPage = client.begin(p.Records, p.RecordPage, before, p.MAX_PAGE).wait(
            timeout_s
        )
        yield from page.records
        before = page.next
        if not before:
            return
