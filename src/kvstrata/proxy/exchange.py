"""One request on its way: computed here, decoded there, or answered whole by whoever is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp

from kvstrata.connectors.hints import forwarded
from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER, prefill_elsewhere
from kvstrata.proxy.engines import Engine

NOT_FOR_PREFILL = (
    "stream_options", "min_tokens", "n", "best_of", "echo",
    "logprobs", "top_logprobs", "prompt_logprobs",
)  # fmt: skip
"""Fields that say how to answer, and nothing about the prompt."""
CONNECT_S = 5.0
SILENT_S = 600.0
"""Between two pieces of an answer: for an engine to make one, and for a client to take it."""


class EngineFailed(Exception):
    """An engine did not answer, or answered that it cannot."""

    def __init__(self, engine: Engine, why: str) -> None:
        super().__init__(f"{engine.name}: {why}")
        self.engine = engine


class Refused(Exception):
    """An engine finds fault with the request, which no other engine would take either."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


class Answer:
    """What an engine answers: its first piece is here, the others may still come.

    Args:
        engine: whose it is.
        response: an open response.
        first: its first piece; the whole where it is not streamed.
    """

    def __init__(self, engine: Engine, response: aiohttp.ClientResponse, first: bytes) -> None:
        self.engine = engine
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "application/json")
        self._response = response
        self._first = first
        self._at_close: Callable[[], None] | None = None

    def at_close(self, call: Callable[[], None]) -> None:
        """Call this once nobody wants more of it."""
        self._at_close = call

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it.

        Raises:
            EngineFailed: the engine was lost, or fell silent, in the middle.
        """
        yield self._first
        content = self._response.content
        late = aiohttp.ServerTimeoutError(f"silent for {SILENT_S:g} s in the middle of an answer")
        try:
            while True:
                with within(SILENT_S, lambda: content.set_exception(late)):
                    piece = await content.readany()
                if not piece:
                    return
                yield piece
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise _failed(self.engine, error) from error

    def close(self) -> None:
        """Want no more of it: an engine aborts what it still computes. Repeatable."""
        self._response.close()
        if self._at_close is not None:
            call, self._at_close = self._at_close, None
            call()


class Exchange:
    """One client's request.

    Args:
        session: for connections to engines.
        path: such as ``/v1/completions``.
        body: what the client sent.
        headers: that the engines get.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        self._session = session
        self._path = path
        self._body = dict(body)
        self._headers = dict(headers)

    @property
    def body(self) -> Mapping[str, Any]:
        """What the client sent."""
        return self._body

    @property
    def streams(self) -> bool:
        """Whether the client wants the answer piece by piece."""
        return self._body.get("stream") is True

    async def split(self, prefill: Engine, decode: Engine) -> Answer:
        """Have one engine compute the prompt, and another one go on with it.

        Both begin at once where it is known where the first one's node is.

        Raises:
            EngineFailed: one of them is of no use.
            Refused: the request is not in order.
        """
        computing = asyncio.ensure_future(self._compute(prefill))
        opening: asyncio.Future[Answer] | None = None
        try:
            if prefill.address:
                params: dict[str, Any] | None = prefill_elsewhere(prefill.address, prefill.secret)
            else:
                params = await computing
            opening = asyncio.ensure_future(self._open(decode, self._with(params)))
            await asyncio.wait({computing, opening}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                computing.result()
            return await opening
        finally:
            # An answer that has begun needs the prompt no more than one that will not come.
            for task in (computing, opening):
                if task is not None and not task.done():
                    task.cancel()
            await _heard(computing)

    async def whole(self, engine: Engine) -> Answer:
        """Have one engine do all of it.

        Raises:
            EngineFailed: it is of no use.
        """
        return await self._open(engine, self._body)

    async def _compute(self, prefill: Engine) -> dict[str, Any] | None:
        """Have an engine compute the prompt; what the one that decodes is to be told."""
        body = {name: value for name, value in self._body.items() if name not in NOT_FOR_PREFILL}
        body.update(
            stream=False,
            max_tokens=1,
            kv_transfer_params=forwarded(COMPUTE_FOR_ANOTHER, self._sent),
        )
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        answer = await self._open(prefill, body)
        if answer.status != 200:
            raise Refused(answer)
        try:
            params = json.loads(answer._first).get("kv_transfer_params")
        except (ValueError, AttributeError) as error:
            raise EngineFailed(prefill, "it answers with something else than JSON") from error
        if not isinstance(params, dict):
            return None
        ours = params.get("kvstrata")
        if isinstance(ours, dict) and isinstance(ours.get("peer"), str):
            prefill.address = ours["peer"]
            prefill.secret = str(ours.get("secret", ""))
        return params

    def _with(self, params: dict[str, Any] | None) -> dict[str, Any]:
        if params is None:
            return self._body
        return {**self._body, "kv_transfer_params": forwarded(params, self._sent)}

    @property
    def _sent(self) -> Any:
        return self._body.get("kv_transfer_params")

    async def _open(self, engine: Engine, body: Mapping[str, Any]) -> Answer:
        """Send a body to an engine; returns once the first piece of its answer is here.

        Raises:
            EngineFailed: it is of no use, or falls silent before.
        """
        opening = asyncio.ensure_future(self._opened(engine, body))
        silent = asyncio.ensure_future(engine.silent.wait())
        try:
            await asyncio.wait({opening, silent}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise EngineFailed(engine, "it is silent")
        except BaseException:
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            raise
        finally:
            silent.cancel()
        return opening.result()

    async def _opened(self, engine: Engine, body: Mapping[str, Any]) -> Answer:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        response = None
        try:
            response = await self._session.post(
                engine.url.with_path(self._path), json=body, timeout=timeout,
                headers=engine.headers(self._headers), allow_redirects=False,
            )  # fmt: skip
            streams = body.get("stream") is True and response.status == 200
            first = await (response.content.readany() if streams else response.read())
            if response.status >= 500 or 300 <= response.status < 400:
                raise EngineFailed(engine, f"status {response.status}")
            if not first:
                raise EngineFailed(engine, "it answers nothing")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            if response is not None:
                response.close()
            raise _failed(engine, error) from error
        except BaseException:
            if response is not None:
                response.close()
            raise
        return Answer(engine, response, first)


@contextmanager
def within(seconds: float, late: Callable[[], object]) -> Iterator[None]:
    """Do something, and this if it takes longer."""
    timer = asyncio.get_running_loop().call_later(seconds, late)
    try:
        yield
    finally:
        timer.cancel()


def _failed(engine: Engine, error: Exception) -> EngineFailed:
    """Say what became of an engine, which is left alone until it answers again."""
    why = str(error) or type(error).__name__
    engine.failed(why)
    return EngineFailed(engine, why)


async def _heard(task: asyncio.Future[Any]) -> None:
    """Wait for the end of a task, however it ends."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
