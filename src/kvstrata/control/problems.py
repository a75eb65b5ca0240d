"""Every error as a problem (RFC 9457): one form, the field's name where one is wrong."""

from __future__ import annotations

import http
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from kvstrata import errors
from kvstrata.errors import KVStrataError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
MAX_WRONG = 16
"""Fields that are named at once."""


class Wrong(BaseModel):
    """One field that is wrong."""

    field: str = Field(description="Where it is, such as `body.tokens.3` or `query.limit`.")
    detail: str


class Problem(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(title="Problem")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    kind: str = Field("", description="The class of `kvstrata.errors`, where it is one.")
    field: str = Field("", description="The first field that is wrong.")
    errors: list[Wrong] = Field([], description="All of them.")


class NoSuch(KVStrataError):
    """What was named is not there."""


class Forbidden(KVStrataError):
    """It takes a token for writing."""


class Invalid(KVStrataError):
    """A field that is well formed and yet wrong.

    Args:
        field: its name in the body.
        problem: what is wrong, and what was expected.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = f"body.{field}"


STATUS: Mapping[type[KVStrataError], int] = {
    NoSuch: 404,
    Forbidden: 403,
    errors.Busy: 503,
    Invalid: 422,
    errors.UsageError: 422,
    errors.ReadOnly: 409,
    errors.TierUnavailable: 503,
    errors.NodeUnavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.Incompatible: 502,
    KVStrataError: 502,
}
"""By the nearest class. What the node fails at is not the client's fault, nor this process's."""


def answer(
    status: int,
    detail: str,
    *,
    kind: str = "",
    wrong: Sequence[Wrong] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A response that tells a problem."""
    problem = Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        kind=kind,
        field=wrong[0].field if wrong else "",
        errors=list(wrong),
    )
    headers = dict(headers or {})
    if status == 503:
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return Response(problem.model_dump_json(), status, headers, MEDIA_TYPE)


def of_error(error: KVStrataError) -> Response:
    """The answer to a request that one of our errors ended."""
    status = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    wrong = [Wrong(field=error.field, detail=str(error))] if isinstance(error, Invalid) else []
    return answer(status, str(error), kind=type(error).__name__, wrong=wrong)


def crashed(error: BaseException) -> Response:
    """The answer to a request that a mistake of ours ended; the log has the trace."""
    return answer(500, "a mistake in the API; its log has the trace", kind=type(error).__name__)


def install(app: FastAPI) -> None:
    """Have an application tell all its errors as problems."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, KVStrataError)
        return of_error(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} is not asked by {request.method}",
        }.get(error.status_code, str(error.detail))
        return answer(error.status_code, detail, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        if any(one["type"] == "json_invalid" for one in found):
            return answer(400, "the body is no JSON", wrong=[Wrong(field="body", detail="no JSON")])
        wrong = [_wrong(one) for one in found[:MAX_WRONG]]
        detail = "; ".join(f"{one.field}: {one.detail}" for one in wrong)
        return answer(422, detail, wrong=wrong)

    async def crash(request: Request, error: Exception) -> Response:
        return crashed(error)  # it is raised on behind this, and the guard logs it

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        KVStrataError: ours,
        HTTPException: http_error,
        RequestValidationError: invalid,
        Exception: crash,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _wrong(one: Mapping[str, Any]) -> Wrong:
    """Never with what was given: it may be a secret, and it may be long."""
    return Wrong(field=".".join(map(str, one["loc"])) or "body", detail=str(one["msg"]))
