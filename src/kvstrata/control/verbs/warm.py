"""Having an engine compute prompts ahead of need, so that they are stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
from blake3 import blake3
from fastapi import APIRouter
from pydantic import Field

from kvstrata.control.base import MAX_TOKENS, PROBLEMS, Asked, Here, Text, TokenIds
from kvstrata.control.jobs import Work
from kvstrata.control.problems import Invalid
from kvstrata.control.verbs.jobs import Job, of_api

router = APIRouter(responses=PROBLEMS, tags=["act"])

MAX_PROMPTS = 4096
MAX_AT_ONCE = 64
PROMPT_S = 600.0
"""For the engine to compute one prompt."""
CONNECT_S = 5.0
MAX_ANSWER_BYTES = 1 << 20
"""Of what an engine says of one prompt, of which it computed one token."""


class Warm(Asked):
    """Prompts, and the engine that is to compute them."""

    url: Text = Field(
        description="Of the engine's OpenAI server, without `/v1`.",
        examples=["http://127.0.0.1:8000"],
    )
    model: Text = Field(description="As that server calls it.")
    prompts: Annotated[list[str | TokenIds], Field(fail_fast=True)] = Field(
        description="Texts or token ids.", min_length=1, max_length=MAX_PROMPTS
    )
    at_once: int = Field(2, ge=1, le=MAX_AT_ONCE, description="How many it is given at a time.")


@router.post("/v1/warm", operation_id="warm", status_code=202)
async def warm(asked: Warm, here: Here) -> Job:
    """Compute a list of prompts through an engine, each with one token to answer; a job.

    The engine's connector stores what is computed. Asking for exactly the same again while it runs
    answers the job that runs. A prompt that the engine refuses is counted and passed over.
    """
    url = _endpoint(asked.url)
    digest = blake3(asked.model_dump_json().encode()).digest()

    async def work(job: Work) -> None:
        await _compute(job, url, asked)

    shown = url.copy_with(path="/", username="", password="")
    words = f"{len(asked.prompts)} prompts through {shown}"
    return of_api(here.jobs.begin("warm", len(asked.prompts), digest, work, words))


def _endpoint(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.rstrip("/"))
    except (httpx.InvalidURL, ValueError) as error:
        raise Invalid("url", f"is no URL: {error}") from error
    named = url.host and "%" not in url.host
    if url.scheme not in ("http", "https") or not named or url.path not in ("", "/"):
        raise Invalid("url", "is no engine's; expected one such as http://127.0.0.1:8000")
    return url.copy_with(path="/v1/completions", query=None, fragment=None)


async def _ask(client: httpx.AsyncClient, url: httpx.URL, body: dict[str, Any]) -> int:
    """How many tokens of a prompt an engine has computed.

    Raises:
        httpx.HTTPError: it does not answer, or refuses.
        KeyError, TypeError, ValueError, RecursionError: it answers something else, or too much.
    """
    # What is not compressed is as long as what has come of it.
    async with client.stream("POST", url, json=body, headers={"Accept-Encoding": "identity"}) as it:
        it.raise_for_status()
        answer = bytearray()
        async for piece in it.aiter_raw():
            answer += piece
            if len(answer) > MAX_ANSWER_BYTES:
                raise ValueError("too long")
    tokens = json.loads(answer)["usage"]["prompt_tokens"]
    if not isinstance(tokens, int) or not 0 <= tokens <= MAX_TOKENS:
        raise ValueError("no number of tokens")
    return tokens


async def _compute(job: Work, url: httpx.URL, asked: Warm) -> None:
    """All prompts, some at a time; nothing an engine answers gets into the job but numbers."""
    timeout = httpx.Timeout(PROMPT_S, connect=CONNECT_S)
    left: Iterator[tuple[int, str | list[int]]] = iter(enumerate(asked.prompts))

    async def go_on(client: httpx.AsyncClient) -> None:
        for number, prompt in left:
            body = {"model": asked.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            try:
                tokens = await _ask(client, url, body)
                job.tokens += tokens
            except httpx.HTTPStatusError as error:
                job.trouble(f"prompt {number}: the engine answered {error.response.status_code}")
            except (httpx.HTTPError, OSError) as error:
                job.trouble(f"prompt {number}: {type(error).__name__}")
            except (KeyError, TypeError, ValueError, RecursionError):
                job.trouble(f"prompt {number}: that is no OpenAI server")
            job.done += 1

    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        working = [asyncio.ensure_future(go_on(client)) for _ in range(asked.at_once)]
        try:
            await asyncio.gather(*working)
        finally:
            for one in working:
                one.cancel()
