"""How a command comes to the fleet's registry, and to a prompt's keys without a node."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kvstrata.cli.join import fail
from kvstrata.errors import KVStrataError, TierUnavailable, UsageError

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.fleet.members import Member, Model
    from kvstrata.fleet.registry import Registry

TokensFile = Annotated[
    Path, typer.Argument(help="A file with the prompt's token ids as a JSON list; -: stdin.")
]
ModelNamespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        help="Digest of the namespace, as `kvstrata cluster members --json` shows it. Default: "
        "the one that is in use, if there is only one.",
    ),
]


class Keyed(NamedTuple):
    """A prompt by its keys: of which model, how many tokens it has, its chunks' keys."""

    model: Model
    num_tokens: int
    keys: list[bytes]


@contextlib.contextmanager
def registry_of(config: Config) -> Iterator[Registry]:
    """The configured registry; one that does not answer ends the command with exit status 1."""
    from kvstrata.fleet.registry import Registry

    registry = Registry.of(config)
    try:
        yield registry
    except TierUnavailable as error:
        fail(error)
    finally:
        registry.close()


def keyed(
    members: Sequence[Member], secret: bytes, tokens: Path, namespace: str | None, salt: str = ""
) -> Keyed:
    """A prompt's chunks, by the namespaces that the members tell.

    Args:
        members: of the fleet.
        secret: the deployment's.
        tokens: file of its token ids.
        namespace: digest; None: the only one.
        salt: of the request.
    Raises:
        UsageError: the file holds no token ids, or no member knows the namespace.
        KVStrataError: there are several namespaces, or none yet.
    """
    from kvstrata.pagekeys import chain_of

    ids = _token_ids(tokens)
    model = _model(members, namespace)
    digest = bytes.fromhex(model.namespace)
    chain = chain_of(secret, digest, model.chunk_tokens, salt, pages=model.pages)
    return Keyed(model, len(ids), chain.keys(ids))


def _token_ids(file: Path) -> list[int]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        ids = json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"no token ids in {file}: {error}") from error
    if not isinstance(ids, list):
        raise UsageError(f"{file} holds no JSON list")
    return ids


def _model(members: Sequence[Member], wanted: str | None) -> Model:
    known = {model.namespace: model for member in members for model in member.models}
    if wanted is not None:
        if wanted not in known:
            raise UsageError(f"no node knows the namespace {wanted}; there are {sorted(known)}")
        return known[wanted]
    if len(known) != 1:
        raise KVStrataError(
            f"{len(known)} namespaces are in use: name one with --namespace: {sorted(known)}"
            if known
            else "no engine has told a node of its namespace yet"
        )
    return next(iter(known.values()))
