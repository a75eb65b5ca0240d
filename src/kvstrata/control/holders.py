"""How much of a prompt each node of the fleet holds, by the fleet's registry, for routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvstrata.errors import UsageError
from kvstrata.fleet.holdings import lookup
from kvstrata.fleet.members import Member, Model
from kvstrata.fleet.registry import Registry
from kvstrata.pagekeys import chain_of


class Sought(NamedTuple):
    """A prompt in the fleet.

    Args:
        tokens: its ids.
        secrets: the deployment's.
        model: its model's name, as the engine was given it; None: any.
        namespace: the same by digest.
        salt: the request's.
    """

    tokens: Sequence[int]
    secrets: Sequence[bytes]
    model: str | None
    namespace: str | None
    salt: str

    def fits(self, model: Model) -> bool:
        """Whether it may be the prompt's."""
        if self.namespace is not None:
            return model.namespace == self.namespace
        return self.model in (None, model.model)


def hits(registry: Registry, nodes: Sequence[str], sought: Sought) -> dict[str, int]:
    """Leading tokens of a prompt that each of these nodes has in tiers of its own; blocks.

    Returns:
        By the name of each that is a member of the fleet.

    Raises:
        UsageError: none of them is, or none has told of such a model.
        TierUnavailable: the registry does not answer.
    """
    members = [member for member in registry.members() if member.name in set(nodes)]
    if not members:
        raise UsageError("none of the nodes is a member of the fleet by that name")
    models = {one.namespace: one for member in members for one in member.models}
    fitting = [model for model in models.values() if sought.fits(model)]
    if not fitting:
        raise UsageError("no engine of these nodes has told of such a model")
    most = dict.fromkeys((member.name for member in members), 0)
    for model in fitting:
        for name, tokens in _held(registry, members, model, sought).items():
            most[name] = max(most[name], tokens)
    return most


def _held(
    registry: Registry, members: Sequence[Member], model: Model, sought: Sought
) -> Mapping[str, int]:
    """The tokens that members have of it in one namespace."""
    digest, size = bytes.fromhex(model.namespace), model.chunk_tokens
    asked = [one for one in members if any(x.namespace == model.namespace for x in one.models)]
    most: dict[str, int] = {}
    for secret in sought.secrets:
        chain = chain_of(secret, digest, size, sought.salt, pages=model.pages)
        keys = chain.keys(sought.tokens)
        for found in lookup(registry, keys, model.of_chunk, asked, model.needs):
            name = found.member.name
            most[name] = max(most.get(name, 0), len(found.tiers) * size)
    return most
