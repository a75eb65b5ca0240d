"""``kvstrata demo --sglang``: a real SGLang answers cold, from its own cache, memory, and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstrata.cli.demo_story import CHUNK_TOKENS, STEP_TOKENS, Story
from kvstrata.header import MARK_TOKENS

if TYPE_CHECKING:
    from kvstrata.testing.sglang import SGLang
    from kvstrata.wire.client import NodeClient

TIMES_WARM = 3


class SGLangDemo(Story):
    """One SGLang and its node, before and after a restart."""

    def run(self) -> None:
        """See `Story.run`."""
        from kvstrata.testing.models import smollm2
        from kvstrata.testing.workplace import Workplace

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        tokenizer = self._read_documents(model, beyond=MARK_TOKENS)
        disk = Path(tempfile.mkdtemp(prefix="disk-", dir=self._out))
        settings = {
            "host.capacity": "1GiB",
            "disk.path": str(disk),
            "disk.capacity": "2GiB",
        }
        try:
            with Workplace(model, settings) as place:
                with self._engine(place, model) as (engine, client):
                    self._first_life(engine, client, tokenizer)
                self._say("ended SGLang and the node; only the files on disk are left")
                with self._engine(place, model) as (engine, client):
                    self._second_life(engine, client)
        finally:
            shutil.rmtree(disk, ignore_errors=True)

    @contextmanager
    def _engine(self, place: Any, model: Path) -> Iterator[tuple[SGLang, NodeClient]]:
        """A new SGLang, warmed up, and a client of its node; both end with it."""
        from kvstrata.testing.sglang import CPU_ENVIRONMENT, CPU_OPTIONS, SGLang, storage
        from kvstrata.testing.workplace import wait_ready

        self._say("starting SGLang with KVStrata, about 20 s")
        on_cpu = not _has_gpu()
        longest = max(self._steps) * STEP_TOKENS + 2 * STEP_TOKENS
        options: Mapping[str, object] = {
            **storage(place.settings),
            "page-size": CHUNK_TOKENS,
            "chunked-prefill-size": STEP_TOKENS,
            "context-length": longest,
            "max-total-tokens": 2 * longest,
            **(CPU_OPTIONS if on_cpu else {}),
        }
        environment = {**place.environment, **(CPU_ENVIRONMENT if on_cpu else {})}
        engine = SGLang(model, place.folder / "sglang.log", environment, options)
        try:
            engine.wait()
            version = metadata.version("sglang")
            client = place.client()
            self.machine = {"cores": os.cpu_count(), "sglang": version, "threads": os.cpu_count()}
            self._say(
                f"SGLang {version} is up (pid {engine.pid}), KVStrata's node with "
                f"{client.hello.capacity_bytes >> 20} MiB (pid {client.hello.pid})"
            )
            wait_ready(client)
            # The first steps of a process are slow, whatever they compute.
            engine.answer(self._warm_up, 1)
            engine.answer(self._warm_up, 1)
            with self.others.counted(os.getpid(), engine.pid, client.hello.pid):
                yield engine, client
        finally:
            engine.kill()
            place.end()

    def _first_life(self, engine: SGLang, client: NodeClient, tokenizer: Any) -> None:
        from kvstrata.testing.workplace import wait_stored

        stored = len(self._warm_up) // CHUNK_TOKENS
        for asked, prompt in zip(self.asked, self._prompts, strict=True):
            self._ask("cold", engine.answer, client, asked, prompt, 0)
            answer = tokenizer.decode(asked.tokens["cold"][0], skip_special_tokens=True)
            asked.answer = " ".join(answer.split())
            # Let the stores and the disk finish: this is about answers, not about writes.
            stored += len(prompt) // CHUNK_TOKENS
            wait_stored(client, stored)
            held = _whole_pages(prompt)
            for _ in range(TIMES_WARM):
                self._ask("own", engine.answer, client, asked, prompt, held)
                engine.forget()
                self._ask("host", engine.answer, client, asked, prompt, held)
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: cold "
                f"{asked.ms('cold'):.0f} ms, SGLang's own hit {asked.ms('own'):.0f} ms, "
                f"forgotten by SGLang and loaded from host memory {asked.ms('host'):.0f} ms"
            )
            self._say(f"    its answer: The text {asked.answer} ...")

    def _second_life(self, engine: SGLang, client: NodeClient) -> None:
        for time_asked in range(TIMES_WARM):
            if time_asked:  # the first time everything has just been restarted
                engine.forget()
                client.clear(tiers=["host"])
            for asked, prompt in zip(self.asked, self._prompts, strict=True):
                self._ask("disk", engine.answer, client, asked, prompt, _whole_pages(prompt))
        for asked in self.asked:
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: loaded from disk "
                f"{asked.ms('disk'):.0f} ms; the answers are "
                f"{'the same, token by token' if asked.same else 'OTHER ONES'}"
            )


def _whole_pages(prompt: Sequence[int]) -> int:
    """Tokens of a prompt that can be loaded: whole pages, and one token is always computed."""
    return (len(prompt) - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
