"""``kvstrata demo --blend``: documents in another order, computed and blended, and what that costs.

Each order is answered exactly, with nothing stored, and by each plan. After each answer the same is
asked once more for the probabilities of its first token, and their KL is what was damaged there.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.demo_story import CHUNK_TOKENS, Story
from kvstrata.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kvstrata.testing.engine import Engine
    from kvstrata.wire.client import NodeClient

DOCUMENTS, DOCUMENT_TOKENS, ORDERS, ANSWER_TOKENS = 6, 500, 3, 16
HEAD = "Here are some documents.\n\n"
QUESTION = "\n\nQuestion: What are the documents above about?\n\nAnswer: They"
WAYS: Mapping[str, tuple[str, float] | None] = {
    "computed": None,
    "deviation 15%": ("deviation", 0.15),
    "edges 15%": ("edges", 0.15),
    "nothing anew": ("none", 0.0),
}
"""How each order is answered: by which plan and ratio; None: exactly."""
EXACT: Mapping[str, Any] = {"kvstrata": {"store": False, "load": False}}
"""What a request says that is computed, and leaves nothing."""
COLOURS = {
    "computed": "#9aa5b1",
    "deviation 15%": "#0b7285",
    "edges 15%": "#5c940d",
    "nothing anew": "#e8590c",
}


@dataclass(frozen=True)
class Answered:
    """One order in one way.

    Args:
        order: number of it, from 1.
        way: one of `WAYS`.
        first_ms: to the first token.
        kl: of the first token's probabilities against the exact ones, nats.
        tokens: of the answer.
        text: the same in words.
    """

    order: int
    way: str
    first_ms: float
    kl: float
    tokens: list[int]
    text: str


class BlendDemo(Story):
    """One engine and its node."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, ())
        self.answers: list[Answered] = []

    def run(self) -> None:
        """See `Story.run`."""
        from transformers import AutoTokenizer

        from kvstrata.testing.models import documents, smollm2
        from kvstrata.testing.workplace import Workplace, wait_ready

        self._say("the model: SmolLM2-135M, unpacked to bfloat16 (once)")
        model = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = documents(DOCUMENTS, DOCUMENT_TOKENS, tokenizer)
        settings = {"host.capacity": "1GiB", "blend": "on", "hints": "all", "planner": "off"}
        options = {"max_num_batched_tokens": 4096, "max_logprobs": -1}
        with Workplace(model, settings) as place:
            self._say("starting vLLM with KVStrata, about 20 s")
            engine = place.engine(options)
            about = engine.wait()
            client = place.client()
            self.machine = {"cores": os.cpu_count(), **about}
            wait_ready(client)
            # It shows that it can blend; and the first steps of a process are slow.
            for _ in range(2):
                engine.ask(documents(1, 1024, tokenizer, seed=1)[0])
            with self.others.counted(os.getpid(), client.hello.pid):
                self._ask_all(engine, client, tokenizer, texts)

    def _ask_all(
        self, engine: Engine, client: NodeClient, tokenizer: Any, texts: Sequence[list[int]]
    ) -> None:
        from kvstrata.testing.workplace import wait_stored

        before = _num_objects(client)
        prompt, segments = joined(tokenizer, texts)
        # Its answer fills the last chunk, so that the last document is found whole.
        engine.ask(prompt, CHUNK_TOKENS, transfer=named(segments))
        wait_stored(client, before + len(prompt) // CHUNK_TOKENS + 2 * DOCUMENTS)
        self._say(
            f"{DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens were computed once, side by side"
        )
        chance = random.Random(0)
        for order in range(1, ORDERS + 1):
            prompt, segments = joined(tokenizer, chance.sample(texts, len(texts)))
            exact: list[float] = []
            for way, plan in WAYS.items():
                transfer = EXACT if plan is None else named(segments, plan)
                engine.reset_prefix_cache()
                heard = engine.ask(prompt, ANSWER_TOKENS, transfer=transfer)
                engine.reset_prefix_cache()
                likely = engine.likely(prompt, transfer=transfer)
                if plan is None:
                    exact = likely
                elif heard.cached_tokens < DOCUMENTS * DOCUMENT_TOKENS // 2:
                    raise UsageError(f"{way}: hardly anything was found: see kvstrata status")
                text = tokenizer.decode(heard.tokens, skip_special_tokens=True)
                self.answers.append(
                    Answered(order, way, round(heard.first_s * 1e3, 1),
                             round(divergence(exact, likely), 6), heard.tokens,
                             " ".join(text.split()))
                )  # fmt: skip
                one = self.answers[-1]
                self._say(f"order {order}, {way}: {one.first_ms:,.0f} ms, KL {one.kl:.4f}")
                self._say(f"    its answer: They {one.text} ...")

    def report(self, seconds: float, *, as_json: bool) -> None:
        """Write what was found, and print it."""
        results = {
            "model": "SmolLM2-135M-Instruct, bfloat16",
            "machine": self.machine,
            "seconds": round(seconds, 1),
            "others_share": round(self.others.share, 3),
            "answers": [asdict(one) for one in self.answers],
            "ways": summary(self.answers),
        }
        file = self._out / "demo-blend.json"
        file.write_text(json.dumps(results, indent=2) + "\n")
        drawn = plot(self.answers, file.with_suffix(".png"))
        if as_json:
            typer.echo(json.dumps(results, indent=2))
            return
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 110).print(table(self.answers))
        files = f"{file}" + (f" and {file.with_suffix('.png')}" if drawn else "")
        typer.echo(f"wrote {files} in {seconds:.0f} s")


def joined(tokenizer: Any, texts: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """A prompt of texts, and where they are in it."""
    tokens = list(tokenizer.encode(HEAD))
    segments = []
    for text in texts:
        segments.append([len(tokens), len(tokens) + len(text)])
        tokens += text
    return [*tokens, *tokenizer.encode(QUESTION)], segments


def named(segments: list[list[int]], plan: tuple[str, float] | None = None) -> dict[str, Any]:
    """What a request says that names its texts, and perhaps wants others' of them."""
    blend: dict[str, Any] = {"segments": segments}
    if plan is not None:
        blend |= {"plan": plan[0], "ratio": plan[1]}
    return {"kvstrata": {"blend": blend}}


def divergence(exact: Sequence[float], other: Sequence[float]) -> float:
    """KL(exact || other) of two lists of log-probabilities, nats."""
    return sum(math.exp(p) * (p - q) for p, q in zip(exact, other, strict=True) if p > -math.inf)


def summary(answers: Sequence[Answered]) -> dict[str, dict[str, float]]:
    """Of each way: median times, how many times faster than computing, mean KL, equal answers."""
    exact = {one.order: one for one in answers if WAYS[one.way] is None}
    found = {}
    for way in dict.fromkeys(one.way for one in answers):
        some = [one for one in answers if one.way == way]
        found[way] = {
            "first_ms": statistics.median(one.first_ms for one in some),
            "faster": statistics.median(exact[one.order].first_ms / one.first_ms for one in some),
            "kl": statistics.fmean(one.kl for one in some),
            "same_answers": sum(one.tokens == exact[one.order].tokens for one in some),
            "orders": len(some),
        }
    return found


def table(answers: Sequence[Answered]) -> Table:
    """For people, a row a way."""
    from rich.table import Table

    title = f"{DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens in another order"
    found = Table(title=title, header_style="bold")
    for heading in ("", "first token, ms", "faster", "KL of it, nats", "same answers"):
        found.add_column(heading, justify="right")
    for way, one in summary(answers).items():
        found.add_row(
            way,
            f"{one['first_ms']:,.0f}",
            f"{one['faster']:.1f}x",
            f"{one['kl']:.4f}",
            f"{one['same_answers']:.0f} of {one['orders']:.0f}",
        )
    return found


def plot(answers: Sequence[Answered], path: Path) -> bool:
    """Draw time to the first token against KL; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.4), dpi=160)
    for way, one in summary(answers).items():
        some = [each for each in answers if each.way == way]
        axes.scatter(
            [each.first_ms / 1e3 for each in some], [each.kl for each in some],
            s=18, alpha=0.4, color=COLOURS[way],
        )  # fmt: skip
        axes.scatter(
            [one["first_ms"] / 1e3], [one["kl"]], s=80, color=COLOURS[way],
            label=f"{way}: {one['faster']:.1f}x",
        )  # fmt: skip
    axes.set_xlabel("seconds to the first token")
    axes.set_ylabel("KL of the first token, nats")
    axes.set_xlim(left=0)
    axes.set_title(
        "Documents in another order: sooner, and what that does", loc="left", fontsize=12
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _num_objects(client: NodeClient) -> int:
    return int(client.status()["counters"].get("stored_objects_total", 0))
