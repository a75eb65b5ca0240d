"""How a command comes to the API: over HTTP where one is configured, else within itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.cli.join import configured, fail
from kvstrata.errors import (
    ConfigError,
    DeadlineExceeded,
    Incompatible,
    KVStrataError,
    NodeUnavailable,
    TierUnavailable,
)

if TYPE_CHECKING:
    from kvstrata.config.api import ApiConfig
    from kvstrata.control import Client

ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="URL",
        help="Ask this API, such as https://node-a:7780; before the configuration's `api.listen`.",
    ),
]


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Around an import of what the extra `control` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            "api", f"needs {error.name}; run: pip install 'kvstrata[control]'"
        ) from error


def api_url(config: ApiConfig) -> str:
    """Where the API is that is configured."""
    from kvstrata.transfer.tcp import Address

    if not isinstance(config.listen, Address):
        return f"unix:{config.listen}"
    return f"{'http' if config.tls_certificate is None else 'https'}://{config.listen}"


@contextlib.contextmanager
def asking(
    config_file: Path | None, settings: list[str] | None, node: str | None, api: str | None
) -> Iterator[Client]:
    """A client of the API that the options name; a "no" of its ends the command with status 1.

    ``--api`` or `api.listen` say where it is. Without them, or with ``--node``, the command speaks
    to the node itself, so no API need run.
    """
    config = configured(config_file, settings, node)
    with importable():
        from kvstrata.control import Client
        from kvstrata.control.access import own_token
        from kvstrata.control.inprocess import client as inside
    if api is None and config.api.listen is not None and node is None:
        api = api_url(config.api)
    if api is None:
        client = inside(config)
    else:
        client = Client(
            api, own_token(config.api, os.environ), certificates=config.api.tls_certificate
        )
    with client:
        try:
            yield client
        except (NodeUnavailable, DeadlineExceeded, TierUnavailable) as error:
            fail(error)
        except Incompatible:
            raise
        except KVStrataError as error:
            fail(error)
