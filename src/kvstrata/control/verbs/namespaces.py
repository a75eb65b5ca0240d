"""Which models' KV the node holds, as engines told it."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import PROBLEMS, Here, Hex32, Told
from kvstrata.control.prompts import known

router = APIRouter(responses=PROBLEMS, tags=["look"])


class Namespace(Told):
    """What one namespace is made of; two caches share nothing unless all of it is equal."""

    digest: Hex32 = Field(description="By which it is named.")
    model: str = Field(description="The model's name, as the engine was given it.")
    chunk_tokens: int = Field(description="Tokens of a chunk.")
    tenant: str
    adapter: str
    tensor_parallel: int = Field(description="1 where every size shares, see `slices`.")
    pipeline_parallel: int
    context_parallel: int
    slices: int = Field(
        description="Into how many a layer's KV heads are cut, where every tensor-parallel size "
        "shares them; 0: they are those of one size."
    )
    pages: bool = Field(
        description="Whether its keys are those of pages, as where several engines share them."
    )
    selection: str = Field(
        description="By which method, with which parameters, tokens were selected; empty: all are "
        "there."
    )
    details: dict[str, str] = Field(description="What the model's fingerprint is made of.")


class Namespaces(Told):
    """The ones that engines used last, the latest last."""

    namespaces: list[Namespace]


@router.get("/v1/namespaces", operation_id="namespaces")
async def namespaces(here: Here) -> Namespaces:
    """The namespaces that engines told the node of, 16 at most."""
    found = await here.link.ask(known)
    return Namespaces(
        namespaces=[
            Namespace(
                digest=one.digest,
                model=one.model.get("name", ""),
                chunk_tokens=one.parts.chunk_tokens,
                tenant=one.parts.tenant,
                adapter=one.parts.adapter,
                tensor_parallel=one.parts.tensor_parallel,
                pipeline_parallel=one.parts.pipeline_parallel,
                context_parallel=one.parts.context_parallel,
                slices=one.parts.slices,
                pages=one.parts.pages,
                selection=one.parts.selection,
                details=one.model,
            )
            for one in found
        ]
    )
