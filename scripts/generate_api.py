"""Write docs/api.md: its introduction, and the reference from the API's own OpenAPI description.

``--check`` only compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvstrata.config import load_config
from kvstrata.control.app import build

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = Path(__file__).with_name("api_introduction.md")


def page() -> str:
    """The whole page."""
    _, app = build(load_config(environ={}, overrides={"host.capacity": "1MiB"}))
    return INTRODUCTION.read_text(encoding="utf-8") + "\n" + "\n".join(_reference(app.openapi()))


def _reference(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "## Reference\n"
    yield (
        "Made from the description that the API itself gives (`/v1/openapi.json`, OpenAPI "
        f"{schema['openapi']}). Every answer that is no success is a problem.\n"
    )
    shapes: dict[str, None] = {}
    for path, verbs in schema["paths"].items():
        for verb, operation in verbs.items():
            yield f"### `{verb.upper()} {path}`\n"
            yield _prose(operation["description"])
            fields = [
                (f"`{one['name']}`", one["schema"], one.get("description", ""), one["required"])
                for one in operation.get("parameters", [])
            ]
            if "requestBody" in operation:
                name = _name(operation["requestBody"]["content"]["application/json"]["schema"])
                body = schema["components"]["schemas"][name]
                fields += _fields(body, shapes)
            if fields:
                yield from _table("asked", fields, shapes)
            (code,) = [code for code in operation["responses"] if code.startswith("2")]
            for kind, told in operation["responses"][code]["content"].items():
                shape = _type(told["schema"], shapes) if _name(told["schema"]) else f"`{kind}`"
                yield f"Answers {code} with {shape}.\n"
    yield "## Shapes\n"
    done: set[str] = set()
    while left := [name for name in shapes if name not in done]:
        for name in left:
            done.add(name)
            shape = schema["components"]["schemas"][name]
            yield f"### {name}\n"
            yield _prose(shape["description"])
            yield from _table("field", _fields(shape, shapes), shapes)


def _fields(
    shape: Mapping[str, Any], shapes: dict[str, None]
) -> list[tuple[str, Mapping[str, Any], str, bool]]:
    needed = shape.get("required", [])
    return [
        (f"`{name}`", one, one.get("description", ""), name in needed)
        for name, one in shape.get("properties", {}).items()
    ]


def _table(
    head: str, fields: list[tuple[str, Mapping[str, Any], str, bool]], shapes: dict[str, None]
) -> Iterator[str]:
    yield f"| {head} | type | meaning |\n|---|---|---|"
    for name, one, about, needed in fields:
        more = "" if needed or head != "asked" else f" Default: {_default(one)}."
        yield f"| {name} | {_type(one, shapes)} | {about}{more} |".replace("  ", " ")
    yield ""


def _default(one: Mapping[str, Any]) -> str:
    value = one.get("default")
    return "left out" if value is None else f"`{value!r}`".replace("'", '"')


def _type(one: Mapping[str, Any], shapes: dict[str, None]) -> str:
    if (name := _name(one)) == "JsonValue":
        return "anything"
    if name:
        shapes.setdefault(name)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in one:
        kinds = [_type(kind, shapes) for kind in one["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "const" in one:
        return f"`{str(one['const']).lower()}`"
    kind = one.get("type", "anything")
    if kind == "array":
        return f"list of {_type(one['items'], shapes)}"
    if kind == "object" and isinstance(one.get("additionalProperties"), dict):
        return f"map to {_type(one['additionalProperties'], shapes)}"
    if one.get("pattern") == "^[0-9a-f]{64}$":
        return "64 hex digits"
    low, high = one.get("minimum"), one.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:g}"
    return str(kind)


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _prose(text: str) -> str:
    return " ".join(text.split("\n")).replace("  ", "\n\n") + "\n"


def main() -> None:
    """Write the page, or with ``--check`` fail if it is not what the code says."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is stale: run scripts/generate_api.py")


if __name__ == "__main__":
    main()
