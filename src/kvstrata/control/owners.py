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


def owners_of(node: NodeClient, whose: Whose) -> list[bytes]:
    """The owner's digests by each of the deployment's secrets, the one of stores first.

    None where no owner is named.

    Raises:
        Invalid: it is named in two ways, or by a salt alone.
    """
    if whose.owner is not None and (whose.tenant is not None or whose.salt):
        raise Invalid("owner", "expected either owner or tenant and salt")
    if whose.owner is not None:
        return [bytes.fromhex(whose.owner)]
    if whose.tenant is not None:
        return [owner_digest(one, whose.tenant, whose.salt) for one in node.hello.secrets]
    if whose.salt:
        raise Invalid("tenant", "expected tenant, or owner")
    return []


def named_owners(node: NodeClient, whose: Whose) -> list[bytes]:
    """The same of an owner that has to be named.

    Raises:
        Invalid: none is named, or as of `owners_of`.
    """
    found = owners_of(node, whose)
    if not found:
        raise Invalid("tenant", "expected tenant, or owner")
    return found
