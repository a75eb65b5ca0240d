"""A client of an OpenAI server that asks on and on."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from benchmarks.common import Wrong

from kvstrata.testing.serving import ANSWER_S, Streamed, stream


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
        self.join(ANSWER_S)
        if self.trouble is not None:
            raise Wrong(f"a client failed: {self.trouble}") from self.trouble
        return self.answers
