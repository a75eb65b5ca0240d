"""``kvstrata demo --fleet``: what one vLLM has computed another one, with a node of its own, loads.

Two engines, two nodes, one store. The nodes share nothing else, as on two machines: not their
memory, not a disk. A shared folder stands for the store; `docs/object-store.md` has the others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.cli.demo_results import Asked
from kvstrata.cli.demo_story import CHUNK_TOKENS, STEP_TOKENS, Story
from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kvstrata.testing.engine import Engine
    from kvstrata.wire.client import NodeClient

STORE = "object_store"


class FleetDemo(Story):
    """The story of a fleet, told on stderr while it happens; arguments as of `Story`."""

    def run(self) -> None:
        """All of it; raises `UsageError` where a hit came from elsewhere than it is said to."""
        from kvstrata.testing.models import smollm2
        from kvstrata.testing.workplace import Workplace, wait_stored

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        tokenizer = self._read_documents(model)
        shared = Path(tempfile.mkdtemp(prefix="fleet-", dir=self._out))
        (shared / "store").mkdir()
        settings = {
            "host.capacity": "1GiB",
            "secret_file": str(shared / "secret"),
            f"{STORE}.url": f"file://{shared / 'store'}",
            f"{STORE}.capacity": "2GiB",
            f"{STORE}.lookup_timeout": "1s",
        }
        options = {"max_num_batched_tokens": STEP_TOKENS}
        try:
            with ExitStack() as ends:
                self._say("starting two vLLM, each with a node of its own, about 40 s")
                places = [ends.enter_context(Workplace(model, settings)) for _ in range(2)]
                engines = [place.engine(options) for place in places]
                for engine in engines:
                    engine.wait()
                clients = [place.client() for place in places]
                for engine, client in zip(engines, clients, strict=True):
                    self._started(engine, client)
                stored = len(self._warm_up) // CHUNK_TOKENS
                for asked, prompt in zip(self.asked, self._prompts, strict=True):
                    self._answer("cold", engines[0], clients[0], asked, prompt)
                    answer = tokenizer.decode(asked.tokens["cold"][0], skip_special_tokens=True)
                    asked.answer = " ".join(answer.split())
                    stored += len(prompt) // CHUNK_TOKENS
                    wait_stored(clients[0], stored)
                    clients[0].flush()
                    self._answer("fleet", engines[1], clients[1], asked, prompt)
                    self._say(
                        f"document {asked.number}, {asked.prompt_tokens:,} tokens: the first vLLM "
                        f"computes it in {asked.ms('cold'):.0f} ms, the second one has it in "
                        f"{asked.ms('fleet'):.0f} ms; the answers are "
                        f"{'the same, token by token' if asked.same else 'OTHER ONES'}"
                    )
        finally:
            shutil.rmtree(shared, ignore_errors=True)

    def _answer(
        self,
        way: str,
        engine: Engine,
        client: NodeClient,
        asked: Asked,
        prompt: Sequence[int],
    ) -> None:
        name = f'hit_chunks_total{{tier="{STORE}"}}'
        before = client.status()["counters"].get(name, 0)
        self.ask_once(way, engine, asked, prompt)
        hits = client.status()["counters"].get(name, 0) - before
        expected = 0 if way == "cold" else len(prompt) // STEP_TOKENS * STEP_TOKENS // CHUNK_TOKENS
        if hits < expected or (hits and not expected):
            raise UsageError(
                f"document {asked.number}, {way}: {hits:.0f} chunks came from the store, "
                f"{expected} expected; `kvstrata doctor` may say why"
            )


def table(documents: Sequence[Asked]) -> Table:
    """The times for people, a row a document."""
    from rich.table import Table

    found = Table(title="time to the first token, ms", header_style="bold")
    for heading in ("document", "tokens", "first vLLM: computed", "second vLLM: from the store",
                    "is faster", "same tokens"):  # fmt: skip
        found.add_column(heading, justify="right")
    for asked in documents:
        found.add_row(
            str(asked.number),
            f"{asked.prompt_tokens:,}",
            f"{asked.ms('cold'):,.0f}",
            f"{asked.ms('fleet'):,.0f}",
            f"{asked.faster('fleet'):.0f}x",
            "yes" if asked.same else "[bold red]NO[/]",
        )
    return found
