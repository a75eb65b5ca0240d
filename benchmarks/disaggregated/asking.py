"""Clients of an OpenAI server that note when each token came."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.common import Wrong

TIMEOUT_S = 600.0


class Streamed(NamedTuple):
    """An answer: when it was asked for, and when each token came, in seconds."""

    begun: float
    times: list[float]
    tokens: list[int]

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Between a token and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def stream(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> Streamed:
    """Have a prompt answered, token by token, greedily.

    Raises:
        Wrong: the answer broke off.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun, times, tokens = time.perf_counter(), list[float](), list[int]()
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise Wrong(f"an answer broke off: {event['error']}")
            new = [token for choice in event["choices"] for token in choice["token_ids"]]
            times += [time.perf_counter()] * len(new)
            tokens += new
    if len(tokens) != max_tokens:
        raise Wrong(f"{len(tokens)} tokens instead of {max_tokens}")
    return Streamed(begun, times, tokens)


class Talker(threading.Thread):
    """Asks one short prompt after the other until it is told to stop."""

    def __init__(
        self, url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> None:
        super().__init__(daemon=True)
        self._asked = (url, model, max_tokens)
        self._prompts = prompts
        self._stop_asking = threading.Event()
        self.answers: list[Streamed] = []
        self.trouble: BaseException | None = None
        self.start()

    def run(self) -> None:
        number = 0
        url, model, max_tokens = self._asked
        try:
            while not self._stop_asking.is_set():
                prompt = self._prompts[number % len(self._prompts)]
                self.answers.append(stream(url, model, prompt, max_tokens))
                number += 1
        except BaseException as error:
            self.trouble = error

    def stop(self) -> list[Streamed]:
        """The answers, once the last one has ended.

        Raises:
            Wrong: one broke off.
        """
        self._stop_asking.set()
        self.join(TIMEOUT_S)
        if self.trouble is not None:
            raise Wrong(f"a client failed: {self.trouble}") from self.trouble
        return self.answers
