"""The application: all verbs behind the guard, described by OpenAPI."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import kvstrata
from kvstrata.config import Config
from kvstrata.control import problems
from kvstrata.control.access import load_tokens
from kvstrata.control.base import State
from kvstrata.control.guard import Guard
from kvstrata.control.link import NodeLink
from kvstrata.control.verbs import (
    about,
    clear,
    dashboard,
    explain,
    fleet,
    holdings,
    jobs,
    lookup,
    metrics,
    moving,
    namespaces,
    records,
    route,
    tenants,
    upkeep,
    warm,
)
from kvstrata.fleet.registry import Registry

ROUTERS = tuple(
    verb.router
    for verb in (
        about,
        metrics,
        lookup,
        namespaces,
        fleet,
        records,
        explain,
        route,
        holdings,
        clear,
        warm,
        moving,
        tenants,
        upkeep,
        jobs,
    )
)
"""A new verb is a file in `verbs` and a name here."""
READS = (*lookup.READS, *explain.READS, *route.READS, *holdings.READS)
"""What is posted and yet changes nothing that the node holds."""

DESCRIPTION = "/v1/openapi.json"

ABOUT = """\
The HTTP API of a KVStrata node. Every error is a problem (RFC 9457, `application/problem+json`)
with the name of the field that is wrong. Everything may be repeated.
"""


def build(config: Config) -> tuple[ASGIApp, FastAPI]:
    """What an HTTP server runs, and the application within the guard.

    Raises:
        ConfigError: tokens are needed and missing, or cannot be read.
    """
    tokens = load_tokens(config.api, os.environ)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        registry = None if config.fleet.registry is None else Registry.of(config)
        state = State(config, NodeLink(config), registry=registry)
        app.state.kvstrata = state
        try:
            yield
        finally:
            await state.jobs.close()
            state.link.close()
            for lane in (state.tokenizing, state.fleet):
                lane.threads.shutdown(wait=False, cancel_futures=True)
            if registry is not None:
                registry.close()

    app = FastAPI(
        title="KVStrata",
        version=kvstrata.__version__,
        description=ABOUT,
        openapi_url=None,  # FastAPI would render it anew for each request
        docs_url=None,  # these pages would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=life,
    )
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(dashboard.router)
    app.openapi_schema = described(app)
    rendered = JSONResponse(app.openapi_schema)
    app.router.routes.append(Route(DESCRIPTION, rendered, methods=["GET"]))
    return Guard(app, tokens, config.api.is_local, READS, dashboard.PATHS), app


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description: every error is a problem, and FastAPI's own form of one is gone."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            default = operation["responses"]["default"]["content"]
            default.pop("application/json", None)
            default[problems.MEDIA_TYPE] = {"schema": {"$ref": "#/components/schemas/Problem"}}
    schemas = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{}, {"token": []}]
    return schema
