"""The dashboard: one page for a browser, which asks the API as anybody does."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

from kvstrata.control.problems import NoSuch

router = APIRouter(include_in_schema=False)

FOLDER = "dashboard"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # Nothing from other hosts, nothing inline, and no page around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _read() -> dict[str, tuple[bytes, str]]:
    found = {}
    for file in (files("kvstrata.control") / FOLDER).iterdir():
        kind = TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = (file.read_bytes(), f"{kind}; charset=utf-8")
    return found


FILES = _read()
PATHS = frozenset({"/", *[f"/{FOLDER}/{name}" for name in FILES]})
"""What needs no token: the page itself tells nothing."""


def _answer(name: str) -> Response:
    content, kind = FILES[name]
    return Response(content, media_type=kind, headers=HEADERS)


@router.get("/")
async def page() -> Response:
    """The page."""
    return _answer("index.html")


@router.get(f"/{FOLDER}/{{name}}")
async def file(name: str) -> Response:
    """What belongs to it."""
    if name not in FILES:
        raise NoSuch(f"there is no {name}")
    return _answer(name)
