"""A prompt that somebody asks about, and the keys of its chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from pydantic import Field, JsonValue

from kvstrata.control.base import Asked, Hex32, State, Text, TokenIds
from kvstrata.control.problems import Invalid
from kvstrata.keys import owner_digest
from kvstrata.pagekeys import chain_of
from kvstrata.wire.client import NodeClient
from kvstrata.wire.namespaces import Shown
from kvstrata.wire.protocol import MAX_KEYS

Keys = Annotated[list[Hex32], Field(fail_fast=True, max_length=MAX_KEYS)]
Messages = Annotated[list[dict[str, JsonValue]], Field(fail_fast=True, max_length=4096)]


class Prompt(Asked):
    """One of `tokens`, `text`, `messages` and `keys`, and whose they are."""

    tokens: TokenIds | None = Field(None, description="Token ids.")
    text: str | None = Field(None, description="A text, as for `/v1/completions`.")
    messages: Messages | None = Field(None, description="Messages, as for `/v1/chat/completions`.")
    keys: Keys | None = Field(None, description="Chunk keys in hex, from the prompt's head on.")
    model: Text | None = Field(
        None, description="Whose; may be left out where engines told the node of one only."
    )
    namespace: Hex32 | None = Field(
        None, description="The same by digest, where a model's name says too little."
    )
    salt: Text = Field("", description="The request's `cache_salt`.")


def known(node: NodeClient) -> list[Shown]:
    """The namespaces that a node tells, the latest last."""
    return msgspec.convert(node.status()["namespaces"], list[Shown])


def chosen(found: list[Shown], namespace: str | None, model: str | None) -> Shown:
    """The one that is meant: by its digest, by its model's name, or the only one.

    Raises:
        Invalid: none is, or more than one.
    """
    if namespace is not None:
        fits = [one for one in found if one.digest == namespace]
        field, what = "namespace", f"no engine told this node of a namespace {namespace}"
    elif model is not None:
        fits = [one for one in found if one.model.get("name") == model]
        field, what = "model", f"no engine told this node of a model {model}"
    else:
        fits, field, what = found, "model", "no engine has told this node of its model yet"
    if not fits:
        names = sorted({one.model.get("name", "") for one in found})
        raise Invalid(field, what + (f"; it knows {', '.join(names)}" if names else ""))
    if len(fits) > 1:
        digests = ", ".join(one.digest for one in fits)
        raise Invalid("namespace", f"several are meant; name one by its digest: {digests}")
    return fits[0]


@dataclass
class Chunks:
    """The chunks of a prompt.

    Args:
        namespace: that they are in.
        tokens: how many the prompt has; of keys alone, that they cover.
        keys: by each of the deployment's secrets, in their order; of keys alone, those.
        owner: whose they are.
        ids: the prompt's token ids; of keys alone, none.
    """

    namespace: Shown
    tokens: int
    keys: list[list[bytes]]
    owner: bytes
    ids: list[int] = field(default_factory=list)

    @property
    def digest(self) -> bytes:
        """The namespace's."""
        return bytes.fromhex(self.namespace.digest)

    @property
    def parts(self) -> list[int]:
        """What makes up a chunk."""
        sizes = self.namespace.parts
        ranks = (sizes.slices or sizes.tensor_parallel) * sizes.pipeline_parallel
        return list(self.namespace.objects or range(ranks))


async def chunks_of(here: State, prompt: Prompt) -> Chunks:
    """Find a prompt's chunks.

    Raises:
        Invalid: it is no prompt, or the node knows no such model.
        UsageError: its text cannot be made into tokens here.
    """
    names = ("tokens", "text", "messages", "keys")
    given = [name for name in names if getattr(prompt, name) is not None]
    if len(given) != 1:
        raise Invalid(
            given[-1] if given else names[0], f"expected exactly one of {', '.join(names)}"
        )
    if prompt.salt and given == ["keys"]:
        raise Invalid("salt", "the keys have it in them already")

    def ask(node: NodeClient) -> tuple[list[Shown], list[bytes]]:
        return known(node), node.hello.secrets

    found, secrets = await here.link.ask(ask)
    namespace = chosen(found, prompt.namespace, prompt.model)
    chunk_tokens = namespace.parts.chunk_tokens
    owner = owner_digest(secrets[0], namespace.parts.tenant, prompt.salt)
    if prompt.keys is not None:
        keys = [bytes.fromhex(key) for key in prompt.keys]
        return Chunks(namespace, len(keys) * chunk_tokens, [keys], owner)
    tokens = await _tokens(here, prompt, namespace)
    if len(tokens) // chunk_tokens > MAX_KEYS:
        raise Invalid(given[0], f"{len(tokens)} tokens; {MAX_KEYS * chunk_tokens} at most")
    digest, pages = bytes.fromhex(namespace.digest), namespace.parts.pages

    def make() -> list[list[bytes]]:
        salt = prompt.salt
        chains = [chain_of(one, digest, chunk_tokens, salt, pages=pages) for one in secrets]
        return [chain.keys(tokens) for chain in chains]

    return Chunks(namespace, len(tokens), await here.tokenizing.run(make), owner, tokens)


async def _tokens(here: State, prompt: Prompt, namespace: Shown) -> list[int]:
    if prompt.tokens is not None:
        return prompt.tokens

    def make() -> list[int]:
        model: dict[str, Any] = namespace.model
        tokenizer = here.tokenizers.of(model.get("name", ""), model.get("weights", ""))
        if prompt.text is not None:
            return tokenizer.text(prompt.text)
        return tokenizer.messages(prompt.messages or [])

    return await here.tokenizing.run(make)
