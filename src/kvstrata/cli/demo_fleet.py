"""``kvstrata demo --fleet``: what one vLLM has computed another one, with a node of its own, loads.

Two engines, two nodes, and each document three times. The first engine computes it. The second one
has it from a store that both nodes share: a shared folder; `docs/object-store.md` has the others.
Then all is forgotten, and prefill and decode are apart: a proxy has the first engine compute the
document and the second one answer, which loads it from the first one's node meanwhile. The nodes
share nothing else, as on two machines: not their memory, not a disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.error import URLError

from kvstrata.cli.demo_results import Asked
from kvstrata.cli.demo_story import ANSWER_TOKENS, CHUNK_TOKENS, STEP_TOKENS, Story
from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kvstrata.testing.serving import Program, Server, Streamed
    from kvstrata.wire.client import NodeClient

STORE, PEER = "object_store", "peer"
ACQUAINTED = 5
"""Tries, of which the first few may come before the one node knows the other."""
NUM_BLOCKS = 96
"""Of an engine's own memory: the longest document, and some more."""
#: how the answers are asked for, and the tier that their prompts must come from
WAYS = {"cold": "", "fleet": STORE, "apart": PEER}


class Side(NamedTuple):
    """An engine and a client of its node."""

    server: Server
    client: NodeClient

    def counted(self, name: str) -> float:
        """A counter of the node's."""
        return float(self.client.status()["counters"].get(name, 0))

    def hits(self, tier: str) -> float:
        """Chunks that the node has found in a tier so far."""
        return self.counted(f'hit_chunks_total{{tier="{tier}"}}')


class Fleet(NamedTuple):
    """Both sides, and the proxy before them."""

    first: Side
    second: Side
    proxy: Program

    def forget(self) -> None:
        """Have nothing of any document, neither the engines nor the nodes nor the store."""
        for side in (self.first, self.second):
            side.server.reset_prefix_cache()
        self.first.client.clear()
        self.second.client.clear(tiers=["host"])


class FleetDemo(Story):
    """The story of a fleet, told on stderr while it happens; arguments as of `Story`."""

    def run(self) -> None:
        """See `Story.run`."""
        from kvstrata.testing.models import smollm2

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        # One token beyond whole steps: all ways compute it in a step of its own.
        tokenizer = self._read_documents(model, beyond=1)
        shared = Path(tempfile.mkdtemp(prefix="fleet-", dir=self._out))
        try:
            with self._started(model, shared) as fleet, self.others.counted(os.getpid()):
                for asked, prompt in zip(self.asked, self._prompts, strict=True):
                    self._tell(fleet, asked, prompt)
                    answer = tokenizer.decode(asked.tokens["cold"][0], skip_special_tokens=True)
                    asked.answer = " ".join(answer.split())
        finally:
            shutil.rmtree(shared, ignore_errors=True)

    @contextmanager
    def _started(self, model: Path, shared: Path) -> Iterator[Fleet]:
        """All processes, warmed up."""
        from kvstrata.testing.engine import engine_environment
        from kvstrata.testing.ports import HOST, free_port
        from kvstrata.testing.serving import Program, Server, on_core
        from kvstrata.testing.workplace import Workplace, wait_ready

        (shared / "store").mkdir()
        listen = f"{HOST}:{free_port()}"
        common = {
            "host.capacity": "512MiB",
            "secret_file": str(shared / "secret"),
            "deadlines.request": "10s",
            "planner": "off",  # this shows what loads, on however busy a machine
            f"{STORE}.url": f"file://{shared / 'store'}",
            f"{STORE}.capacity": "2GiB",
            f"{STORE}.lookup_timeout": "1s",
            f"{STORE}.epoch_every": "1s",
        }
        # Apart both are at work at once, so each has a core of its own in all ways.
        cores = sorted(os.sched_getaffinity(0))
        roles = ({"network.listen": listen}, {"peer.named": listen, "peer.lookup_timeout": "1s"})
        with ExitStack() as ends:
            self._say("starting two vLLM, each with a node of its own, and a proxy; about a minute")
            sides = []
            for role, core in zip(roles, (cores[0], cores[-1]), strict=True):
                place = ends.enter_context(Workplace(model, {**common, **role}, service=True))
                options = {
                    "max-num-batched-tokens": STEP_TOKENS,
                    "num-gpu-blocks-override": NUM_BLOCKS,
                    "kv-transfer-config": json.dumps(place.connector),
                }
                with on_core(core):
                    log = place.folder / "server.log"
                    server = Server(model, log, place.environment, options)
                ends.callback(server.kill)
                sides.append(Side(server, place.client()))
            port = free_port()
            command = [
                "-m", "kvstrata.cli", "proxy", f"--port={port}",
                f"--prefill={sides[0].server.url}", f"--decode={sides[1].server.url}",
            ]  # fmt: skip
            proxy = Program(command, port, shared / "proxy.log", engine_environment({}))
            ends.callback(proxy.kill)
            for program in (*[side.server for side in sides], proxy):
                program.wait()
            self.machine = {
                "cores": os.cpu_count(),
                "vllm": sides[0].server.version(),
                "threads": 1,
            }
            for server, client in sides:
                size = client.hello.capacity_bytes >> 20
                self._say(
                    f"vLLM {self.machine['vllm']} is up with 1 thread (pid {server.pid}), "
                    f"KVStrata's node with {size} MiB (pid {client.hello.pid})"
                )
                wait_ready(client)
            # The first steps of a process are slow, whatever they compute.
            for side in sides * 2:
                _asked(side.server, self._warm_up, 1)
            first, second = sides
            fleet = Fleet(first, second, proxy)
            self._acquaint(fleet)
            yield fleet

    def _acquaint(self, fleet: Fleet) -> None:
        """Have the proxy hear where the first node is, and the second node meet it."""
        for _ in range(ACQUAINTED):
            fleet.forget()
            _asked(fleet.proxy, self._warm_up, 1)
            if fleet.second.hits(PEER):
                return
        raise UsageError(f"the second node finds nothing in the first: {fleet.proxy.last_words()}")

    def _tell(self, fleet: Fleet, asked: Asked, prompt: Sequence[int]) -> None:
        from kvstrata.testing.workplace import wait_stored

        stored = fleet.first.counted("stored_objects_total")
        self._answer("cold", fleet.first, fleet.first.server, asked, prompt)
        wait_stored(fleet.first.client, int(stored) + len(prompt) // CHUNK_TOKENS)
        self._answer("fleet", fleet.second, fleet.second.server, asked, prompt)
        fleet.forget()
        self._answer("apart", fleet.second, fleet.proxy, asked, prompt)
        self._say(
            f"document {asked.number}, {asked.prompt_tokens:,} tokens: the first vLLM computes it "
            f"in {asked.ms('cold'):.0f} ms, the second one has it from the store in "
            f"{asked.ms('fleet'):.0f} ms, or while the first one computes it in "
            f"{asked.ms('apart'):.0f} ms; the answers are "
            f"{'the same, token by token' if asked.same else 'OTHER ONES'}"
        )

    def _answer(
        self, way: str, side: Side, program: Program, asked: Asked, prompt: Sequence[int]
    ) -> None:
        """Have a document answered, and see where its chunks were found by the side's node."""
        before = {tier: side.hits(tier) for tier in (STORE, PEER)}
        answer = _asked(program, prompt, ANSWER_TOKENS)
        asked.heard(way, answer.first_s, answer.tokens)
        hits = {tier: side.hits(tier) - count for tier, count in before.items()}
        # Whoever decodes is given the end of a prompt too, which fills no chunk.
        chunks = len(prompt) // CHUNK_TOKENS + (way == "apart")
        expected = {tier: chunks * (tier == WAYS[way]) for tier in before}
        if hits != expected:
            raise UsageError(
                f"document {asked.number}, {way}: {_named(hits)}, not {_named(expected)}; "
                "`kvstrata doctor` may say why"
            )


def _asked(program: Program, prompt: Sequence[int], max_tokens: int) -> Streamed:
    try:
        return program.stream(prompt, max_tokens)
    except (URLError, OSError) as error:
        raise UsageError(f"no answer ({error}): {program.last_words()}") from error


def _named(chunks: Mapping[str, float]) -> str:
    """``"12 chunks from peer"``."""
    found = [f"{count:.0f} chunks from {tier}" for tier, count in chunks.items() if count]
    return " and ".join(found) or "no chunk from another node"


def fleet_table(documents: Sequence[Asked]) -> Table:
    """The times for people, a row a document."""
    from rich.table import Table

    found = Table(
        title="time to the first token, ms",
        caption="apart: the first vLLM computes, the second one answers; a core each",
        header_style="bold",
    )
    for heading in ("document", "tokens", "first vLLM: computed", "second vLLM: from the store",
                    "is faster", "prefill and decode apart", "same tokens"):  # fmt: skip
        found.add_column(heading, justify="right")
    for asked in documents:
        found.add_row(
            str(asked.number),
            f"{asked.prompt_tokens:,}",
            f"{asked.ms('cold'):,.0f}",
            f"{asked.ms('fleet'):,.0f}",
            f"{asked.faster('fleet'):.0f}x",
            f"{asked.ms('apart'):,.0f}",
            "yes" if asked.same else "[bold red]NO[/]",
        )
    return found
