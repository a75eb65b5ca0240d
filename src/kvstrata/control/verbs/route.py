"""Which node a prompt should go to, by what each has of it and how busy each is."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, JsonValue

from kvstrata.control.base import PROBLEMS, Asked, Here, Hex32, State, Text, TokenIds, Told, at_most
from kvstrata.control.holders import Sought, hits
from kvstrata.control.problems import Invalid
from kvstrata.control.prompts import chosen, known
from kvstrata.errors import KVStrataError, UsageError
from kvstrata.fleet.registry import Registry
from kvstrata.routing import Prompt, prompt_of_request, prompt_of_tokens
from kvstrata.wire.client import NodeClient
from kvstrata.wire.namespaces import Shown

router = APIRouter(responses=PROBLEMS, tags=["look"])
READS = ("/v1/route",)

MAX_NODES = 256
MAX_NAME = 1024
"""Characters of a model's name."""
LOOK_S = 1.0
"""For node and registry to say what the fleet has; advice that comes later is of no use."""
Load = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class Route(Asked):
    """A prompt, by `tokens` or by `body`, and who may have it."""

    nodes: Annotated[dict[Text, Load], at_most(MAX_NODES)] = Field(
        description="Of each that can be asked now, by its name: the work before it, in tokens to "
        "compute. What members of the fleet hold is known where they have the names that they have "
        "there.",
        min_length=1,
        max_length=MAX_NODES,
        examples=[{"node-a": 0, "node-b": 5000}],
    )
    tokens: TokenIds | None = Field(None, description="Token ids.")
    body: dict[str, JsonValue] | None = Field(
        None, description="A request, as for `/v1/completions` or `/v1/chat/completions`."
    )
    model: Text | None = Field(
        None, description="Whose the tokens are, as the engine was given it."
    )
    namespace: Hex32 | None = Field(
        None, description="The same by digest, where the model has another name in the fleet."
    )
    salt: Text = Field("", description="The `cache_salt` of the tokens' request.")
    sent: bool = Field(
        True,
        description="Whether the prompt will go where the answer says: then that is remembered.",
    )


class Routed(Told):
    """Where it should go."""

    node: str
    reason: str = Field(
        description="`hit`: it has more of the prompt than the other candidates. `load`: it is the "
        "less busy candidate. `moved`: all candidates are too busy. `only`: there is no other."
    )
    hit_tokens: int = Field(description="Tokens of the prompt that it is taken to have.")
    candidates: list[str] = Field(description="Those that were considered first.")
    text: str = Field(description="All of this as a sentence.")
    looked_up: bool = Field(
        description="Whether the fleet's registry said what its members have; else hits are what "
        "this API has sent there."
    )
    note: str = Field(description="Why the registry did not say; empty: it did, or there is none.")


@router.post("/v1/route", operation_id="route")
async def route(asked: Route, here: Here) -> Routed:
    """Say which node a prompt should go to, and why; see `docs/routing.md`.

    Changes nothing in any node. It needs none, nor the registry: where they do not answer, what
    this API has sent decides.
    """
    if (asked.tokens is None) == (asked.body is None):
        raise Invalid("tokens", "expected exactly one of tokens, body")
    if asked.body is not None:
        for name in ("model", "salt"):
            if getattr(asked, name):
                raise Invalid(name, "the body has its own")
    prompt = await here.tokenizing.run(lambda: _prompt(asked))
    held: dict[str, int] = {}
    note = ""
    if here.registry is not None:
        try:
            held = await asyncio.wait_for(_hits(asked, here, here.registry), LOOK_S)
        except asyncio.TimeoutError:
            note = f"node and registry did not answer within {LOOK_S:g} s"
        except KVStrataError as error:
            note = str(error)
    choice = here.advice.route(prompt, list(asked.nodes), asked.nodes, held)
    if asked.sent:
        here.advice.sent(prompt, choice)
    return Routed(
        node=choice.node,
        reason=choice.reason.value,
        hit_tokens=choice.hit_tokens,
        candidates=list(choice.candidates),
        text=str(choice),
        looked_up=bool(held),
        note=note,
    )


def _prompt(asked: Route) -> Prompt:
    if asked.body is not None:
        return prompt_of_request(asked.body)
    return prompt_of_tokens(asked.tokens or (), asked.model or "", asked.salt)


async def _hits(asked: Route, here: State, registry: Registry) -> dict[str, int]:
    """Tokens of the prompt that members of the fleet have.

    Raises:
        KVStrataError: that is not known; why.
    """
    body = asked.body or {}
    name = _name(body["model"]) if body.get("model") else asked.model
    salt = body.get("cache_salt") or asked.salt

    def ask(node: NodeClient) -> tuple[list[Shown], list[bytes]]:
        return known(node), node.hello.secrets

    found, secrets = await here.link.ask(ask)
    tokens = asked.tokens

    def make() -> list[int]:
        namespace = chosen(found, asked.namespace, name)
        return _tokens(body, namespace.model, here)

    if tokens is None:
        tokens = await here.tokenizing.run(make)
    sought = Sought(tokens, secrets, name, asked.namespace, str(salt))
    return await here.fleet.run(lambda: hits(registry, list(asked.nodes), sought))


def _name(model: JsonValue) -> str:
    if isinstance(model, str) and len(model) <= MAX_NAME and model.isprintable():
        return model
    raise UsageError("the body's model is no name")


def _tokens(body: dict[str, Any], model: dict[str, str], here: State) -> list[int]:
    """Of a request's first prompt, by the model's own files.

    Raises:
        UsageError: there is none, or the files are not here.
    """
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return prompt
    tokenizer = here.tokenizers.of(model.get("name", ""), model.get("weights", ""))
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return tokenizer.messages(messages)
    if isinstance(prompt, str):
        return tokenizer.text(prompt)
    raise UsageError("the body has no prompt")
