"""Where chunks are: brought ahead of need, copied, moved, sent, stored anew. All are jobs."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Asked, Here, Text
from kvstrata.control.prompts import Prompt, chunks_of
from kvstrata.control.verbs.jobs import Job, begun

router = APIRouter(responses=PROBLEMS, tags=["act"])


class Copy(Prompt):
    """Whose chunks, from where, to where."""

    source: Text = Field(description="The tier that has them; `host` is host memory.")
    target: Text = Field(description="The tier that is to have them.")


class Send(Prompt):
    """Whose chunks, and who is to have them."""

    peer: Text = Field(description="The other node, `host:port`.")


class Transcode(Asked):
    """What is stored in which form."""

    tier: Text = Field(description="The tier whose objects are stored again.")
    codec: Text = Field("", description="The codec's name; empty: as the tier is configured.")


@router.post("/v1/prefetch", operation_id="prefetch", status_code=202)
async def prefetch(prompt: Prompt, here: Here) -> Job:
    """Bring a prompt's leading chunks into host memory, ahead of need; a job.

    It ends where nobody has the next chunk, or there is no room, and its `note` says which.
    """
    chunks = await chunks_of(here, prompt)
    keys, digest, space = chunks.keys[0], chunks.digest, chunks.namespace
    owner = chunks.owner
    return await begun(
        here,
        lambda node: node.prefetch(keys, chunks.parts, space.orders, (), digest, owner),
    )


@router.post("/v1/copy", operation_id="copy", status_code=202)
async def copy(asked: Copy, here: Here) -> Job:
    """Copy a prompt's chunks from one tier to another, each verified on the way; a job.

    What is there already stays; what `source` does not have is passed over.
    """
    return await _copied(asked, here, move=False)


@router.post("/v1/move", operation_id="move", status_code=202)
async def move(asked: Copy, here: Here) -> Job:
    """The same; each chunk goes from `source` once all of it stands in `target`. A job."""
    return await _copied(asked, here, move=True)


@router.post("/v1/send", operation_id="send", status_code=202)
async def send(asked: Send, here: Here) -> Job:
    """Have another node fetch a prompt's chunks from this one into its host memory; a job."""
    chunks = await chunks_of(here, asked)
    keys, digest, space = chunks.keys[0], chunks.digest, chunks.namespace
    return await begun(
        here,
        lambda node: node.send(keys, asked.peer, chunks.parts, space.orders, (), digest),
    )


@router.post("/v1/transcode", operation_id="transcode", status_code=202)
async def transcode(asked: Transcode, here: Here) -> Job:
    """Store all that a tier of the node's own holds again, with another codec; a job.

    What a lossy codec may have been through gets no second one, and is one of the `troubles`.
    """
    return await begun(here, lambda node: node.transcode(asked.tier, asked.codec))


async def _copied(asked: Copy, here: Here, *, move: bool) -> Job:
    chunks = await chunks_of(here, asked)
    keys, digest, space = chunks.keys[0], chunks.digest, chunks.namespace
    return await begun(
        here,
        lambda node: node.copy(
            keys, asked.source, asked.target, chunks.parts, space.orders, digest, move=move
        ),
    )
