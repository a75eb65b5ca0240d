"""What is to be cleared, as `kvstrata clear` and `kvstrata cluster clear` are told it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from kvstrata.errors import UsageError

TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", help="Only what belongs to this tenant, with the --salt if given."),
]
SaltOption = Annotated[str, typer.Option("--salt", help="The salt of the tenant's requests.")]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", help="Only this namespace, by its digest of 64 hex digits."),
]
OlderOption = Annotated[
    str | None,
    typer.Option("--older-than", metavar="DURATION", help="Only what is older, such as 12h."),
]


def owners(secrets: Sequence[bytes], tenant: str | None, salt: str) -> list[bytes]:
    """Whose chunks are meant, by each of the deployment's secrets; anybody's: one that is empty.

    Raises:
        UsageError: a salt of nobody.
    """
    from kvstrata.keys import owner_digest

    if tenant is None:
        if salt:
            raise UsageError("--salt is of a --tenant")
        return [b""]
    return [owner_digest(secret, tenant, salt) for secret in secrets]


def digest(namespace: str | None) -> bytes:
    """A namespace's 32 bytes; none for any. Raises `UsageError`."""
    try:
        found = bytes.fromhex(namespace or "")
    except ValueError:
        found = b"?"
    if len(found) not in (0, 32):
        raise UsageError(f"the namespace {namespace!r} is no digest of 64 hex digits")
    return found


def age_ns(older_than: str | None) -> int | None:
    """How old what is cleared has to be, in nanoseconds; None: of any age. Raises `UsageError`."""
    from kvstrata.units import parse_duration

    if older_than is None:
        return None
    try:
        return int(1e9 * parse_duration(older_than))
    except ValueError as error:
        raise UsageError(f"--older-than: {error}") from error
