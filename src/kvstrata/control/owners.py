"""Whose something is: by the owner's digest, or by tenant and salt."""

from __future__ import annotations

from pydantic import Field

from kvstrata.control.base import Asked, Hex16, Text
from kvstrata.control.problems import Invalid
from kvstrata.keys import owner_digest
from kvstrata.wire.client import NodeClient


class Whose(Asked):
    """An owner: `owner`, or `tenant` and perhaps `salt`."""

    owner: Hex16 | None = Field(None, description="By digest, as `status` and `pins` show it.")
    tenant: Text | None = Field(None, description="By the tenant's name.")
    salt: Text = Field("", description="And the requests' `cache_salt`.")


def owner_of(node: NodeClient, whose: Whose, needed: bool = True) -> bytes:
    """The owner's digest; empty where none is named.

    Raises:
        Invalid: none is named and one is needed, or it is named in two ways.
    """
    if whose.owner is not None and (whose.tenant is not None or whose.salt):
        raise Invalid("owner", "expected either owner or tenant and salt")
    if whose.owner is not None:
        return bytes.fromhex(whose.owner)
    if whose.tenant is not None:
        return owner_digest(node.hello.secret, whose.tenant, whose.salt)
    if needed or whose.salt:
        raise Invalid("tenant", "expected tenant, or owner")
    return b""
