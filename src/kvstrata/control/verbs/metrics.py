"""The node's metrics, as Prometheus reads them."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from kvstrata.control.base import PROBLEMS, Here
from kvstrata.observe.rendering import CONTENT_TYPE, render
from kvstrata.wire.client import NodeClient

KIND = CONTENT_TYPE.partition(";")[0]

router = APIRouter(
    responses={**PROBLEMS, 200: {"content": {KIND: {"schema": {"type": "string"}}}}},
    tags=["about"],
)


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(here: Here) -> Response:
    """The node's metrics in Prometheus' text format; each is described in docs/metrics.md."""
    text = await here.link.ask(lambda node: render(NodeClient.metrics(node)))
    return Response(text, media_type=CONTENT_TYPE)
