"""What a second engine on a second node gains from what the first one answered."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Ledger,
    Options,
    Prompts,
    Row,
    expect,
    main,
    milliseconds,
    say,
    spread,
)
from benchmarks.node.asking import NAMESPACE, NUM_KEYS, ORDER, RAW, SEED, random_keys
from benchmarks.node.run import store
from benchmarks.stores.run import STORES, started

from kvstrata.cli.counting import total
from kvstrata.testing.engine import Answer, Engine
from kvstrata.testing.ports import HOST, free_port
from kvstrata.testing.workplace import Workplace, wait_ready, wait_stored
from kvstrata.wire import protocol as p

NAME = "fleet"
NUM_DOCUMENTS, ROUNDS = 8, 6
ENGINE = {"max_num_batched_tokens": DOCUMENT_TOKENS}
MOST_ROUNDS = {"redis": 1, "object_store": 3, "mooncake": 1}


def rounds(secret: Path) -> list[Row]:
    """Round trips to each store for a match of a long prompt that another node has stored."""
    rows = []
    keys = random_keys(NUM_KEYS, SEED)
    for name, most in MOST_ROUNDS.items():
        with started(name) as (options, _), ExitStack() as ends:
            settings = {**options, "host.capacity": "64MiB", "secret_file": str(secret)}
            settings[f"{name}.lookup_timeout"] = "1s"
            nodes = [
                ends.enter_context(Workplace(Path(), settings, service=True)).client()
                for _ in range(2)
            ]
            for client in nodes:
                wait_ready(client)
            expect(store(nodes[0], keys) == NUM_KEYS, "not everything was stored")
            nodes[0].flush()
            matched: p.Matched = (
                nodes[1].match(keys, [0], [ORDER], [RAW], namespace=NAMESPACE).wait(30)
            )
            expect(len(matched.tiers) == NUM_KEYS, f"{len(matched.tiers)} chunks were found")
            count = total(nodes[1].status()["counters"], "lookup_rounds_total")
        what = f"{name}: rounds for a match of {NUM_KEYS} chunks (16 calls at most in one)"
        rows.append(Row(NAME, what, count, most))
    return rows


class Second:
    """An engine on a node that had nothing; asks, and proves where the tokens came from."""

    def __init__(
        self, place: Workplace, prompts: list[list[int]], answers: list[list[int]]
    ) -> None:
        self.engine = place.engine(options=ENGINE)
        self._prompts = prompts
        self._answers = answers
        self.engine.wait()
        self.ledger = Ledger(place.client())

    def ask(self, number: int) -> tuple[Answer, dict[str, Any]]:
        """One document, and the record of that request."""
        answer = self.engine.ask(self._prompts[number])
        (record,) = self.ledger.next()
        expect(answer.tokens == self._answers[number], f"document {number}: other tokens")
        expect(answer.cached_tokens == record["loaded_tokens"], f"counted otherwise: {record}")
        return answer, record

    def warm(self, number: int, tier: str) -> float:
        """Seconds to the first token of a document that comes from a tier whole."""
        if tier != "host":
            # For a peer this forgets too what is known of it.
            self.ledger.client.clear(tiers=["host", "peer"] if tier == "peer" else ["host"])
        self.engine.reset_prefix_cache()
        answer, record = self.ask(number)
        tokens = record["host_tokens"] if tier == "host" else record["slower_tokens"]
        expect(tokens == DOCUMENT_TOKENS, f"{tokens} tokens from {tier}: {record}")
        return answer.first_s


def second(
    options: Options,
    model: Path,
    tier: str,
    settings: Mapping[str, Any],
    prompts: list[list[int]],
    answers: list[list[int]],
    warm_up: list[int],
) -> list[Row]:
    """What one way to the first node's chunks is worth."""
    with Workplace(model, settings, service=True) as place:
        it = Second(place, prompts, answers)
        it.engine.ask(warm_up)
        it.ledger.next()
        loaded = [it.ask(number)[1]["loaded_tokens"] for number in range(len(prompts))]
        expect(
            total(place.client().status()["counters"], "hit_chunks_total", tier)
            == sum(loaded) // CHUNK_TOKENS,
            "they came from elsewhere",
        )
        far, near, ratios = [], [], []
        for _ in range(2 if options.quick else ROUNDS):
            for number in range(len(prompts)):
                far.append(it.warm(number, tier))
                near.append(it.warm(number, "host"))
                ratios.append(far[-1] / near[-1])
    say("  " + milliseconds(f"from {tier}", far))
    say("  " + milliseconds("from own memory", near))
    ratio = spread(ratios)
    far_ms, near_ms = (spread(times).median * 1e3 for times in (far, near))
    where = "a peer's memory" if tier == "peer" else tier
    return [
        Row(
            NAME,
            f"prompt tokens that a second engine need not compute, through {where}",
            sum(loaded) / sum(map(len, prompts)),
            0.95,
            at_most=False,
            detail=f"{len(prompts)} prompts of about 3,000 tokens",
        ),
        Row(
            NAME,
            f"warm from {where} on loopback / warm from own memory",
            ratio.median,
            1.35 if tier == "peer" else None,
            detail=f"{ratio}; {far_ms:.0f} and {near_ms:.0f} ms",
        ),
    ]


def engines(options: Options, secret: Path) -> list[Row]:
    """What a second engine has from the first one, by each way."""
    texts = Prompts(options.seed)
    prompts = texts.make(NUM_DOCUMENTS // 2 if options.quick else NUM_DOCUMENTS)
    (warm_up,) = texts.make(1, collection=1)
    listen = f"{HOST}:{free_port()}"
    common = {"host.capacity": "1GiB", "secret_file": str(secret)}
    with ExitStack() as ends:
        ways: dict[str, dict[str, Any]] = {"peer": {"peer.nodes": listen}}
        ways |= {name: ends.enter_context(started(name))[0] for name in STORES}
        everywhere = {key: value for name in STORES for key, value in ways[name].items()}
        first = ends.enter_context(
            Workplace(texts.model, {**common, **everywhere, "network.listen": listen}, True)
        )
        engine: Engine = first.engine(options=ENGINE)
        engine.wait()
        wait_ready(first.client())
        cold = [engine.ask(prompt) for prompt in prompts]
        say("  " + milliseconds("cold", [answer.first_s for answer in cold]))
        wait_stored(first.client(), len(prompts) * DOCUMENT_TOKENS // CHUNK_TOKENS)
        engine.close()
        answers = [answer.tokens for answer in cold]
        return [
            row
            for tier, way in ways.items()
            for row in second(
                options, texts.model, tier, {**common, **way}, prompts, answers, warm_up
            )
        ]


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark."""
    folder = options.folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder.resolve() / "secret"
    return rounds(secret) + engines(options, secret)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))
