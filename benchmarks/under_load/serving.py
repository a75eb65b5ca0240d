"""A vLLM as it serves: `AsyncLLM`, whose engine core is a process of its own, with several requests
in flight.

The HTTP in front of it is left out. It costs every way of answering the same, and noise besides.

``python -m benchmarks.under_load.serving FD`` is the child's side of the pipe.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from kvstrata.testing.engine import Engine, serve_pipe

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What one request got.

    Args:
        first_s: seconds from handing it in to its first token.
        gaps_s: seconds between its tokens.
        tokens: the new tokens.
        cached_tokens: prompt tokens that were not computed, wherever they came from.
    """

    first_s: float
    gaps_s: list[float]
    tokens: list[int]
    cached_tokens: int


@dataclass(frozen=True)
class Turn:
    """Some requests that were served beside each other.

    Args:
        seconds: from handing in the first to the end of the last.
        replies: in the order of the prompts.
        running_gaps_s: between the tokens of the requests that ran all the while.
    """

    seconds: float
    replies: list[Reply]
    running_gaps_s: list[float]

    @property
    def firsts(self) -> list[float]:
        """Times to first token."""
        return [reply.first_s for reply in self.replies]


class Serving(Engine):
    """A serving vLLM in child processes."""

    program = __name__

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        in_flight: int,
        max_tokens: int = 1,
        running: Sequence[Sequence[int]] = (),
    ) -> Turn:
        """Answer prompts, each handed in as soon as fewer than ``in_flight`` are under way.

        Args:
            running: prompts of requests that are answered all the while and then aborted; the
                others begin when each of these has its second token.
        """
        reply = self._call(
            verb="serve",
            prompts=[list(prompt) for prompt in prompts],
            in_flight=in_flight,
            max_tokens=max_tokens,
            running=[list(prompt) for prompt in running],
        )
        replies = [Reply(**fields) for fields in reply["replies"]]
        return Turn(reply["seconds"], replies, reply["running_gaps_s"])


class _Child:
    """An `AsyncLLM`, and a loop that runs while it serves."""

    def __init__(self, options: dict[str, Any]) -> None:
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._vllm = vllm
        self._loop = asyncio.new_event_loop()
        self._number = 0

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

        self._llm: Any = self._run(start())

    def about(self) -> dict[str, Any]:
        cache = self._llm.vllm_config.cache_config
        return {
            "vllm": self._vllm.__version__,
            "num_blocks": cache.num_gpu_blocks,
            "block_tokens": cache.block_size,
        }

    def serve(
        self, prompts: list[list[int]], in_flight: int, max_tokens: int, running: list[list[int]]
    ) -> dict[str, Any]:
        return self._run(self._serve(prompts, in_flight, max_tokens, running))

    def reset(self) -> dict[str, Any]:
        async def forget() -> dict[str, Any]:
            deadline = time.monotonic() + 10.0
            # It answers False while blocks wait to be freed, which takes the engine a step.
            while not await self._llm.reset_prefix_cache():
                if time.monotonic() > deadline:
                    return {"error": "vLLM's prefix cache cannot be reset"}
                await asyncio.sleep(0.005)
            return {}

        return self._run(forget())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    async def _serve(
        self, prompts: list[list[int]], in_flight: int, max_tokens: int, running: list[list[int]]
    ) -> dict[str, Any]:
        stamps: list[list[float]] = [[] for _ in running]
        runners = [
            asyncio.create_task(self._answer(prompt, 4096, into))
            for prompt, into in zip(running, stamps, strict=True)
        ]
        while any(len(each) < 2 for each in stamps):
            await asyncio.sleep(0.002)
        replies: list[dict[str, Any]] = [{} for _ in prompts]
        waiting = iter(enumerate(prompts))
        began = time.perf_counter()
        await asyncio.gather(
            *(self._client(waiting, max_tokens, replies) for _ in range(in_flight))
        )
        ended = time.perf_counter()
        assert not any(runner.done() for runner in runners)
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)
        gaps = [
            there - here
            for each in stamps
            for here, there in pairwise(each)
            if began <= here and there <= ended
        ]
        return {"seconds": ended - began, "replies": replies, "running_gaps_s": gaps}

    async def _client(
        self,
        waiting: Iterator[tuple[int, list[int]]],
        max_tokens: int,
        replies: list[dict[str, Any]],
    ) -> None:
        """One of those that ask: the next prompt when the one before is answered."""
        for i, prompt in waiting:
            replies[i] = await self._answer(prompt, max_tokens, [])

    async def _answer(
        self, prompt: list[int], max_tokens: int, stamps: list[float]
    ) -> dict[str, Any]:
        self._number += 1
        params = self._vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        began = time.perf_counter()
        last: Any = None
        async for output in self._llm.generate(
            {"prompt_token_ids": prompt}, params, str(self._number)
        ):
            stamps.append(time.perf_counter())
            last = output
        return {
            "first_s": stamps[0] - began,
            "gaps_s": [there - here for here, there in pairwise(stamps)],
            "tokens": list(last.outputs[0].token_ids),
            "cached_tokens": last.num_cached_tokens,
        }


if __name__ == "__main__":
    serve_pipe(int(sys.argv[1]), _Child, ("serve", "reset"))
